"""tune() of a loop around an Accelerator on a GPU of 24 GB: GPT-2 at 1024 tokens, and what a scaler scales."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.integrations.accelerate import find_executable_batch_size
from autobatch.probe.state import fingerprint
from autobatch.units import GIB
from tests.gpu.gpt2 import SIZES, gpt2
from tests.gpu.machines import in_new_process, ooms

pytestmark = pytest.mark.gpu

EFFECTIVE = 64
TRIED: list[tuple[int, int]] = []
"""Of a process of its own: each size, and the failures until then."""


@pytest.fixture(autouse=True)
def _no_accelerator_of_another_test() -> Iterator[None]:
    print(f"accelerate {version('accelerate')}, torch {torch.__version__}")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_at_1024_trains_at_what_was_found_and_not_at_more(card_of_24_gb: None, size: str) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    model = gpt2(size)
    rows = [{"input_ids": torch.zeros(1024, dtype=torch.long), "labels": torch.zeros(1024, dtype=torch.long)}]
    loader = DataLoader(rows * (2 * EFFECTIVE), EFFECTIVE, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    before = fingerprint(model, optimizer, torch_device="cuda")
    found = autobatch.tune(accelerator, model, loader, optimizer=optimizer, effective_batch_size=EFFECTIVE)
    assert fingerprint(model, optimizer, torch_device="cuda") == before
    assert not optimizer.state
    micro, steps = loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps
    assert micro * steps == EFFECTIVE
    assert 4 <= micro <= found.batch_size < EFFECTIVE

    def trained(loader: Any) -> int:
        taken: list[Any] = []
        hook = optimizer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        hook.remove()
        return len(taken)

    failures = ooms()
    assert trained(loader) == 2
    assert ooms() == failures
    more = accelerator.prepare(DataLoader(rows * 64, int(found.batch_size * 1.3)))
    with pytest.raises(torch.OutOfMemoryError):
        trained(more)


def scaled(features: int = 256, samples: int = 1 << 11) -> tuple[Accelerator, Any, Any, Any]:
    """Each sample is 16 of the model's rows: a batch has much on the GPU, and is soon put together."""
    accelerator = Accelerator(mixed_precision="fp16")
    model = nn.Sequential(*[nn.Sequential(nn.Linear(features, features), nn.GELU()) for _ in range(4)])
    rows = TensorDataset(torch.zeros(samples, 16, features), torch.zeros(samples, 16, features))
    optimizer = torch.optim.AdamW(model.parameters())
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(rows, samples))


def test_a_scaler_that_ran_out_amid_its_step_is_as_it_was(little_memory: None) -> None:
    accelerator, model, optimizer, loader = scaled()
    assert accelerator.scaler is not None
    before = fingerprint(model, optimizer, accelerator.scaler, torch_device="cuda")
    names = set(vars(optimizer.optimizer))
    trials: list[Any] = []
    found = autobatch.tune(
        accelerator,
        model,
        loader,
        optimizer=optimizer,
        loss_fn=nn.functional.mse_loss,
        effective_batch_size=1 << 11,
        on_trial=trials.append,
    )
    assert any(not trial.fits for trial in trials)
    assert fingerprint(model, optimizer, accelerator.scaler, torch_device="cuda") == before
    assert set(vars(optimizer.optimizer)) == names
    assert not accelerator.scaler._per_optimizer_states
    failures, stepped = ooms(), 0
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            stepped += accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
            optimizer.zero_grad()
    assert (stepped, ooms()) == (1, failures)
    assert found.batch_size >= loader.batch_sampler.batch_size


def train_in_two_gib(batch_size: int, steps: int = 6) -> int:
    """What the decorator is for. Meant for a process of its own, where nothing was before."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * GIB / total)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    TRIED.append((batch_size, ooms()))
    for _ in range(steps):
        model(torch.zeros(batch_size, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return batch_size


def run_at_the_largest_size() -> None:
    """Tells as JSON what was answered, what was tried with the failures until then, and whether 15 % more run out."""
    size = find_executable_batch_size(starting_batch_size=1 << 20)(train_in_two_gib)()
    tried, failures = list(TRIED), ooms()
    try:
        train_in_two_gib(round(size * 1.15))
        more = True
    except torch.OutOfMemoryError:
        more = False
    print(json.dumps({"size": size, "tried": tried, "failures": failures, "more": more}))


def test_a_training_function_runs_at_nearly_the_largest_size_with_few_failures() -> None:
    """By the memory that its first steps took: beside it, what is lost between blocks is little."""
    code = "from tests.gpu.test_tune_accelerate import run_at_the_largest_size; run_at_the_largest_size()"
    found = json.loads(in_new_process(code).splitlines()[-1])
    assert found["tried"][-1][0] == found["size"]
    halved = [1 << power for power in range(20, 0, -1) if 1 << power > found["size"]]
    assert len(found["tried"]) <= len(halved) + 5
    assert found["failures"] <= len(halved) + 3
    # What it reached: a tenth more runs out, or nearly so.
    assert not found["more"]
