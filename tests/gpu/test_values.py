"""What a search leaves behind on a real GPU, bit for bit: looked at without the library's own fingerprint, and seen in
training that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autobatch import Workload, find
from autobatch.probe.state import fingerprint
from autobatch.units import MIB
from tests.gpu.values import DEVICE, bits, differing, seed_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu_values,
    pytest.mark.usefixtures("deterministic", "left_as_found"),
    # torch's own, of a scaler that leaves out a step: ours is a schedule that is stepped in any case.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
BATCH = 8


def layers() -> nn.Module:
    """Little to draw and to copy for a sample, much to keep for backward."""
    return nn.Sequential(nn.Linear(16, 1024), nn.BatchNorm1d(1024), nn.GELU(), nn.Dropout(0.2), nn.Linear(1024, 16))


def image_layers() -> nn.Module:
    """Without pooling, whose gradient is not deterministic."""
    body = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(32, 8, 4, stride=4)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *body, nn.Flatten(), nn.Linear(8, 16))


def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn from the numbers that training draws from."""
    return torch.randn(n, 16), torch.randn(n, 16)


def run_of(
    model: Callable[[], nn.Module],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    precision: str | None = None,
    compiled: Callable[[nn.Module], Any] | None = None,
    sample: Callable[[int], Any] = pairs,
) -> Workload:
    """A run with all that has a state, the same each time."""
    seed_all()
    net = model().to(DEVICE)
    its_optimizer = optimizer(net.parameters())
    # A scale that training changes at once, in both directions.
    scaler = torch.amp.GradScaler(torch.device(DEVICE).type, init_scale=2.0**12, growth_interval=2)
    return Workload(
        net if compiled is None else compiled(net),
        its_optimizer,
        functional.mse_loss,
        sample,
        precision=precision,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(its_optimizer, 20),
        scaler=scaler if precision == "fp16" else None,
        max_grad_norm=1.0,
        ema=AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )


def train(work: Workload, steps: int) -> None:
    for _ in range(steps):
        work.train_step(BATCH)
        work.scheduler.step()


def search(work: Workload) -> Any:
    """In a corner of the card, whatever this process has of it."""
    torch.cuda.empty_cache()
    limit_bytes = torch.cuda.memory_reserved(DEVICE) + 128 * MIB
    return find(work, device=DEVICE, start=BATCH, memory_limit=limit_bytes)


def trained_without_and_with_a_search(made: Callable[[], Workload], steps_before: int) -> tuple[Any, Any]:
    """What a run ends with that never searched, and one that did. What the search changed fails right here."""
    undisturbed = made()
    train(undisturbed, steps_before + 3)
    expected = bits(*undisturbed.stateful)

    work = made()
    train(work, steps_before)
    before = bits(*work.stateful), fingerprint(*work.stateful, torch_device=DEVICE)
    found = search(work)
    assert found.batch_size > 16 * BATCH
    assert found.smallest_failure is not None
    assert differing(before[0], bits(*work.stateful)) == []
    assert fingerprint(*work.stateful, torch_device=DEVICE) == before[1]
    train(work, 3)
    return expected, bits(*work.stateful)


@pytest.mark.parametrize(
    ("model", "precision", "optimizer", "steps_before"),
    [
        (layers, None, lambda p: torch.optim.AdamW(p, fused=True), 3),
        (layers, None, lambda p: torch.optim.AdamW(p, fused=True), 0),
        (layers, "bf16", lambda p: torch.optim.AdamW(p, foreach=True), 3),
        (layers, "fp16", lambda p: torch.optim.AdamW(p, fused=True), 3),
        (layers, "fp16", lambda p: torch.optim.AdamW(p, foreach=False), 3),
        (layers, "fp16", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 0),
        (image_layers, None, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False), 3),
        (image_layers, "bf16", torch.optim.AdamW, 3),
    ],
    ids=["fused", "fused-new", "bf16-foreach", "fp16-fused", "fp16-loop", "fp16-sgd-new", "conv-sgd", "conv-bf16"],
)
def test_nothing_is_changed_and_training_goes_on_as_if_it_had_never_been_searched(
    model: Any, precision: str | None, optimizer: Any, steps_before: int
) -> None:
    expected, ours = trained_without_and_with_a_search(
        lambda: run_of(model, optimizer, precision=precision), steps_before
    )
    assert differing(expected, ours) == []


def test_the_comparison_sees_a_search_that_puts_nothing_back() -> None:
    """The control: a trial changes weights, statistics, averages, the optimizer, the scale and what is drawn."""
    work = run_of(layers, torch.optim.AdamW, precision="fp16")
    train(work, 3)
    before = bits(*work.stateful)
    train(work, 3)
    changed = " ".join(differing(before, bits(*work.stateful)))
    for name in ("0.weight", "running_mean", "AveragedModel", "exp_avg_sq", "GradScaler", "last_epoch", "cuda"):
        assert name in changed


def test_a_compiled_model_is_as_it_was_and_goes_on_so() -> None:
    """Where the same operators run for every batch: Inductor times its kernels, and may choose another one later."""

    def sample(n: int) -> Any:
        batch = pairs(n)
        for tensor in batch:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # else a size that was seen first has a graph of its own
        return batch

    def compiled(net: nn.Module) -> Any:
        torch._dynamo.reset()
        return torch.compile(net, backend="aot_eager")

    expected, ours = trained_without_and_with_a_search(
        lambda: run_of(layers, torch.optim.AdamW, compiled=compiled, sample=sample), 3
    )
    torch._dynamo.reset()
    assert differing(expected, ours) == []
