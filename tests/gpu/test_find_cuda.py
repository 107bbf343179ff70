"""find() on a CUDA GPU, with live objects in this process: answers, and what is left behind.

On a virtual GPU every value is zero, so nothing here looks at one: allocated bytes, None or absent, identities and
random-number offsets tell whether state was put back. Bits are compared on the host and, on a real GPU, below.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autobatch import DoesNotFitError, Outcome, Workload, find
from autobatch.device.cuda import CudaDevice
from autobatch.probe.state import fingerprint
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.units import GIB, MIB

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def _clean_gpu() -> Any:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def net(width: int = 1024, *, checkpointed: bool = False) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
            self.body = nn.ModuleList(block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.first(x))
            for part in self.body:
                x = checkpoint(part, x, use_reentrant=False) if checkpointed else part(x)
            return x

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(), nn.Linear(4 * width, width))

    with torch.device(DEVICE):
        return Net()


def pairs(width: int = 1024) -> Any:
    # Made where they are needed: the host would fill them for real.
    return lambda n: (torch.zeros(n, width, device=DEVICE), torch.zeros(n, width, device=DEVICE))


def workload(model: nn.Module, optimizer: Any = None, **options: Any) -> Workload:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Workload(model, optimizer, functional.mse_loss, pairs(model.first.in_features), **options)


def small_find(work: Workload, **options: Any) -> Any:
    """In a corner of the card, so that a real GPU has little to do as well."""
    return find(work, device=DEVICE, **{"start": 2, "memory_limit": "1GiB", **options})


def left_behind(work: Workload) -> tuple[Any, ...]:
    """All that can be compared without looking at a value on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    return (
        torch.cuda.memory_allocated(),
        torch.cuda.get_per_process_memory_fraction(),
        torch.cuda.default_generators[0].get_offset(),
        [(id(p), p.data_ptr(), p.grad is None, p.requires_grad) for p in work.model.parameters()],
        [(id(b), b.data_ptr()) for b in work.model.buffers()],
        len(work.optimizer.state),
        [module.training for module in work.model.modules()],
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p, capturable=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    ],
    ids=["adamw-foreach", "adamw-fused", "adam-capturable", "sgd-momentum", "sgd-fused"],
)
def test_optimizers(optimizer: Any) -> None:
    model = net()
    work = workload(model, optimizer(model.parameters()))
    torch.zeros(1, device=DEVICE) @ torch.zeros(1, device=DEVICE)  # the context and cuBLAS's workspace stay
    small_find(work, max_batch_size=4)
    before = left_behind(work)
    result = small_find(work)
    assert result.batch_size >= 64
    assert result.smallest_failure > result.batch_size
    assert left_behind(work) == before


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_precisions_schedulers_and_clipping(precision: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    work = workload(model, optimizer, precision=precision, scheduler=scheduler, max_grad_norm=1.0)
    epoch, rate = scheduler.last_epoch, optimizer.param_groups[0]["lr"]
    half = small_find(work).batch_size
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (epoch, rate)
    assert half > small_find(workload(model)).batch_size


def test_checkpointing_lets_more_fit() -> None:
    assert small_find(workload(net(checkpointed=True))).batch_size > small_find(workload(net())).batch_size


def test_frozen_parameters_need_no_optimizer_state() -> None:
    model = net()
    trained = small_find(workload(model)).batch_size
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    assert small_find(workload(model)).batch_size > trained
    assert [p.requires_grad for p in model.body.parameters()] == [False] * 12


def test_accumulation_keeps_gradients_alive() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = small_find(workload(model, sgd)).batch_size
    assert small_find(workload(model, sgd, accumulate=True)).batch_size < plain


def test_evaluation_has_its_own_size() -> None:
    result = small_find(workload(net(), mode="both"))
    assert result.eval_batch_size > result.batch_size
    assert small_find(workload(net(), mode="eval")).batch_size > result.batch_size


def test_evaluation_amid_training_meets_the_optimizer_s_state() -> None:
    """Adam holds as much again as the model, twice: an evaluation alone has that for itself."""
    options = {"memory_limit": "640MiB", "headroom": 0.0}
    amid = small_find(workload(net(), mode="both"), **options).eval_batch_size
    alone = small_find(workload(net(), mode="eval"), **options).batch_size
    assert amid < 0.95 * alone


def test_every_trial_begins_as_training_does() -> None:
    """Steps that find the optimizer's state there need less than the ones that create it."""
    work, device = workload(net()), CudaDevice(DEVICE)
    work.begin()
    run_trial(work, device, TrialRequest(batch_size=2, steps=2))  # cuBLAS's workspace stays
    held = torch.cuda.memory_allocated()
    for size in (64, 8, 64):
        assert run_trial(work, device, TrialRequest(batch_size=size, steps=3)).trial.fits
        assert torch.cuda.memory_allocated() == held
        assert not work.optimizer.state


@dataclass
class Batch:
    x: torch.Tensor


class Tied(nn.Module):
    """HF style: a mapping in, an object with a loss out; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(512, 256), nn.Linear(256, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        ids = input_ids.x if isinstance(input_ids, Batch) else input_ids
        logits = self.head(self.embedding(ids))
        loss = functional.cross_entropy(logits.flatten(0, 1), (ids if labels is None else labels).flatten())
        return {"loss": loss, "logits": logits}


def ids(n: int) -> torch.Tensor:
    return torch.zeros(n, 128, dtype=torch.long)


@pytest.mark.parametrize(
    "sample",
    [lambda n: {"input_ids": ids(n), "labels": ids(n)}, lambda n: (ids(n), ids(n)), lambda n: Batch(ids(n))],
    ids=["dict", "tuple", "dataclass"],
)
def test_batches_and_tied_weights(sample: Any) -> None:
    with torch.device(DEVICE):
        model = Tied()
    work = Workload(model, torch.optim.AdamW(model.parameters()), sample=sample)
    assert small_find(work).batch_size > 64
    assert model.head.weight is model.embedding.weight


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_for_all_sizes() -> None:
    model = net()
    compiled = torch.compile(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # a reset leaves what other tests counted

    def sample(n: int) -> Any:
        batch = pairs()(n)
        torch._dynamo.maybe_mark_dynamic(batch[0], 0)
        return batch

    work = Workload(compiled, torch.optim.AdamW(model.parameters()), functional.mse_loss, sample)
    assert small_find(work).batch_size >= 64
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_the_model_alone_is_told_in_bytes() -> None:
    work = workload(net(2048))
    with pytest.raises(DoesNotFitError, match=r"the model alone needs \d+ bytes"):
        small_find(work, memory_limit=torch.cuda.memory_allocated() // 2)


def test_nothing_fits_beside_the_model() -> None:
    work = workload(net(2048))
    model = work.model
    model.norm = nn.Identity()  # which, unlike batch norm, allows a batch of one
    with pytest.raises(DoesNotFitError, match="batch 1 does not fit") as caught:
        small_find(work, start=1, memory_limit=torch.cuda.memory_reserved() + 24 * MIB)
    assert caught.value.trial.outcome is Outcome.OOM


def test_the_user_s_own_fraction_holds_and_is_put_back() -> None:
    work, total = workload(net()), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(GIB / total)
    try:
        fraction = torch.cuda.get_per_process_memory_fraction()
        result = find(work, device=DEVICE, start=2, headroom=0)
        assert max(t.measurement.peak_reserved_bytes for t in result.trials if t.fits) <= GIB
        assert torch.cuda.get_per_process_memory_fraction() == fraction
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("failures", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_failures_leave_no_byte_behind(failures: int) -> None:
    work, device = workload(net()), CudaDevice(DEVICE)
    too_large = TrialRequest(batch_size=50_000, steps=2, limit_bytes=GIB)
    run_trial(work, device, TrialRequest(batch_size=4, steps=2))  # makes the optimizer's state, once
    run_trial(work, device, too_large)
    allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(failures):
        assert run_trial(work, device, too_large).trial.outcome is Outcome.OOM
    assert torch.cuda.memory_allocated() == allocated_bytes
    assert torch.cuda.memory_reserved() == reserved_bytes


def test_an_answer_survives_training_in_the_same_process() -> None:
    work = workload(net())
    result = small_find(work)
    torch.cuda.set_per_process_memory_fraction(GIB / torch.cuda.mem_get_info()[1])
    try:
        for _ in range(20):
            work.train_step(result.batch_size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu_values
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_every_bit_is_put_back(precision: str | None) -> None:
    work = workload(net(), precision=precision)
    work.train_step(8)
    before = fingerprint(*work.stateful, torch_device=DEVICE)
    small_find(work)
    assert fingerprint(*work.stateful, torch_device=DEVICE) == before
