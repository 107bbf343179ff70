"""Accumulation on the session's GPU: what it holds, and what recovery leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autobatch import Accumulator, DoesNotFitError
from autobatch.training.recovery import Recovery
from autobatch.virtual.attach import present_state
from autobatch.virtual.state import refuse_allocations
from tests.conftest import has_real_gpu

pytestmark = pytest.mark.gpu

FEATURES, LAYERS = 256, 4
SAMPLES = 1 << 14  # 16 MiB for each activation: a block of its own


def made(size: int, told: list[Recovery] | None = None, **options) -> tuple[nn.Module, Accumulator]:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU()) for _ in range(LAYERS)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    on_recovery = None if told is None else told.append
    return model, Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=size, on_recovery=on_recovery, **options)


@pytest.mark.parametrize("windows", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_recovered_windows_leave_no_byte(little_memory, windows):
    told: list[Recovery] = []
    model, accumulator = made(1 << 13, told)
    batch = torch.zeros(1 << 13, FEATURES), torch.zeros(1 << 13, FEATURES)
    for window in range(windows):
        accumulator.micro_batch_size = 1 << 13  # which needs 8 MiB for each of eight activations
        assert accumulator.step(batch).micro_batches > 1
        if window == 0:
            first = torch.cuda.memory_allocated()
    assert len({recovery.window for recovery in told}) == windows
    assert torch.cuda.memory_allocated() == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_peaks_where_a_loop_written_by_hand_does():
    size, parts = 512, 4
    batch = torch.zeros(parts * size, FEATURES), torch.zeros(parts * size, FEATURES)

    def by_hand() -> None:
        loss_fn, total = nn.MSELoss(), torch.zeros((), device="cuda")
        for samples, targets in zip(batch[0].split(size), batch[1].split(size), strict=True):
            x, y = samples.cuda(), targets.cuda()
            loss = loss_fn(model(x), y) / parts
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def peak_of(step) -> int:
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    model, accumulator = made(size)
    ours = peak_of(lambda: accumulator.step(batch))
    optimizer = torch.optim.AdamW(model.parameters())
    assert ours == peak_of(by_hand)


def test_mixed_precision_with_a_scaler():
    scaler = torch.amp.GradScaler("cuda")
    _, accumulator = made(64, precision="fp16", scaler=scaler, max_grad_norm=1.0)
    window = accumulator.step((torch.zeros(200, FEATURES), torch.zeros(200, FEATURES)))
    assert (window.micro_batches, window.stepped) == (4, True)


@pytest.mark.skipif(has_real_gpu(), reason="a real driver refuses what it likes")
def test_every_allocation_of_the_driver_can_be_refused_and_nothing_is_left() -> None:
    """Bytes, steps and counts are those of a run that nothing was refused to; values are zero here."""
    state = present_state()
    assert state is not None
    told: list[Recovery] = []
    model, accumulator = made(SAMPLES, told)
    batch = torch.zeros(SAMPLES, FEATURES), torch.zeros(SAMPLES, FEATURES)
    accumulator.step(batch)
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_stats()["num_device_alloc"]
    window = accumulator.step(batch)
    before = torch.cuda.memory_allocated()  # the window's loss and norm included
    needed = torch.cuda.memory_stats()["num_device_alloc"] - segments
    assert needed > 10
    recovered, too_late, windows = 0, 0, 2
    for after in range(needed):
        accumulator.micro_batch_size = SAMPLES
        told.clear()
        torch.cuda.empty_cache()
        refuse_allocations(Path(state), after, count=2)
        try:
            window = accumulator.step(batch)
        except DoesNotFitError as exc:
            assert "in the optimizer's step" in str(exc)  # noqa: PT017
            too_late += 1
            continue
        finally:
            refuse_allocations(Path(state), 1 << 40)
        windows += 1
        recovered += len(told)
        assert (window.samples, window.stepped, window.micro_batches) == (SAMPLES, True, 1 << len(told))
        assert torch.cuda.memory_allocated() == before
        assert all(parameter.grad is None for parameter in model.parameters())
    assert accumulator.windows == windows
    assert recovered >= 0.8 * needed - too_late > 0
