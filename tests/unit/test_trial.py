"""One trial: outcomes, cleaning up, and what flies."""

from __future__ import annotations

import gc
import traceback
import weakref

import pytest
import torch

from autobatch.errors import DeviceCorruptedError
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.probe.workload import Workload
from autobatch.result import Measurement, Outcome
from autobatch.testing import FakeDevice


def request(batch_size: int = 4, **options: object) -> TrialRequest:
    return TrialRequest(**{"batch_size": batch_size, "steps": 3, **options})


def attempt(device: FakeDevice, step: object = None, **options: object):
    return run_trial(Workload.from_step(step or device.step), device, request(**options))


def test_a_size_that_fits_reports_its_peak_time_and_steps() -> None:
    device = FakeDevice(100, lambda n: 10 * n)
    trial = attempt(device).trial
    assert trial.fits
    assert trial.measurement.peak_allocated_bytes == 40
    assert trial.measurement.capacity_bytes == 100
    assert trial.measurement.step_time_s >= 0
    assert device.steps == [4, 4, 4]
    assert trial.steps == 3


def test_too_large_a_size_is_out_of_memory_with_the_error_s_own_words() -> None:
    trial = attempt(FakeDevice(39, lambda n: 10 * n)).trial
    assert trial.outcome is Outcome.OOM
    assert "40 of 39 bytes" in trial.message
    assert trial.steps == 0


def test_a_failure_in_a_late_step_counts() -> None:
    sizes = iter([10, 10, 200])
    trial = attempt(FakeDevice(100, lambda n: next(sizes))).trial
    assert trial.outcome is Outcome.OOM
    assert trial.steps == 2


def test_the_limit_holds_during_the_trial_only() -> None:
    device = FakeDevice(100, lambda n: 10 * n)
    assert attempt(device, limit_bytes=39).trial.outcome is Outcome.OOM
    assert attempt(device).trial.fits


def test_a_device_that_cannot_be_made_smaller_is_judged_by_its_peak() -> None:
    device = FakeDevice(100, lambda n: 10 * n, shrinkable=False)
    assert attempt(device, limit_bytes=39).trial.outcome is Outcome.OVER_HEADROOM
    assert attempt(device, limit_bytes=40).trial.fits


@pytest.mark.parametrize(
    ("retries_by_step", "outcome"),
    [
        ([0, 0, 0], Outcome.FITS),
        ([5, 0, 0], Outcome.FITS),  # the first step creates the optimizer's state
        ([0, 1, 0], Outcome.FITS),  # settled
        ([0, 1, 1], Outcome.THRASHED),
        ([2, 1, 2], Outcome.THRASHED),
    ],
)
def test_retrying_in_every_settled_step_is_thrashing(retries_by_step: list[int], outcome: Outcome) -> None:
    counts = iter(retries_by_step)
    trial = attempt(FakeDevice(100, lambda n: n, retries=lambda n: next(counts))).trial
    assert trial.outcome is outcome
    assert trial.measurement.alloc_retries == sum(retries_by_step[1:])


@pytest.mark.parametrize(("streams", "outcome", "steps"), [(1, Outcome.OOM, [4]), (2, Outcome.FITS, [4, 4, 4, 4])])
def test_out_of_memory_on_several_streams_is_tried_once_more(streams: int, outcome: Outcome, steps: list[int]) -> None:
    """torch can give up although what another stream has just freed is enough (pytorch#189504)."""
    needed = iter([200, 10, 10, 10])
    device = FakeDevice(100, lambda n: next(needed), streams=streams)
    assert attempt(device).trial.outcome is outcome
    assert device.steps == steps


def test_out_of_memory_twice_on_several_streams_counts() -> None:
    device = FakeDevice(3, lambda n: n, streams=2)
    assert attempt(device).trial.outcome is Outcome.OOM
    assert device.steps == [4, 4]


def test_peaks_are_those_of_the_size_asked_not_of_what_ran_before() -> None:
    trial = attempt(FakeDevice(100, lambda n: n), sizes_before=(50,)).trial
    assert trial.measurement.peak_allocated_bytes == 4


def test_a_history_runs_first_and_is_named() -> None:
    device = FakeDevice(100, lambda n: n)
    trial = attempt(device, sizes_before=(1, 1), history="smaller batches").trial
    assert device.steps == [1, 1, 4, 4, 4]
    assert (trial.history, trial.steps) == ("smaller batches", 3)


@pytest.mark.parametrize("error", [KeyError("shape"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_an_error_that_is_not_about_memory_flies_unchanged(error: Exception) -> None:
    def step(n: int) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        attempt(FakeDevice(100, lambda n: n), step)
    assert caught.value is error


def test_a_kernel_s_limit_is_not_memory() -> None:
    def step(n: int) -> None:
        raise RuntimeError("nll_loss: input has more than INT_MAX elements")

    assert attempt(FakeDevice(100, lambda n: n), step).trial.outcome is Outcome.LIMIT


def test_a_suspect_error_is_handed_on_beside_the_trial() -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    def step(n: int) -> None:
        raise error

    tried = attempt(FakeDevice(100, lambda n: n), step)
    assert tried.trial.outcome is Outcome.OOM
    assert tried.suspect is error


def test_a_broken_context_ends_everything() -> None:
    def step(n: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(DeviceCorruptedError, match="batch 4"):
        attempt(FakeDevice(100, lambda n: n), step)


def test_nothing_of_a_failed_step_is_alive_afterwards() -> None:
    """The traceback would keep the failed step's tensors, through a chain of causes too (pytorch#18853)."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def inner(n: int) -> None:
        big = torch.ones(n)
        alive.append(weakref.ref(big))
        raise MemoryError

    def step(n: int) -> None:
        kept = torch.ones(n)
        alive.append(weakref.ref(kept))
        try:
            inner(n)
        except MemoryError as exc:
            raise RuntimeError("while stepping") from exc

    gc.disable()
    try:
        assert attempt(FakeDevice(100, lambda n: n), step).trial.outcome is Outcome.OOM
    finally:
        gc.enable()
    assert [ref() for ref in alive] == [None, None]


def test_the_inputs_of_a_model_with_hooks_are_not_alive_after_a_failure() -> None:
    """torch calls such a model through a closure, which a frame holds beside its locals."""
    model, alive = torch.nn.Linear(4, 4), list[weakref.ref[torch.Tensor]]()
    model.register_forward_pre_hook(lambda *_: None)

    def fail(*_: object) -> None:
        raise MemoryError

    model.register_forward_hook(fail)

    def step(n: int) -> None:
        batch = torch.ones(n, 4)
        alive.append(weakref.ref(batch))
        model(batch)

    assert attempt(FakeDevice(100, lambda n: n), step).trial.outcome is Outcome.OOM
    assert [ref() for ref in alive] == [None]


def test_the_place_of_a_suspect_error_is_kept() -> None:
    """It is raised as the workload's own if it turns out to mean something else."""

    def step(n: int) -> None:
        raise RuntimeError("CUDNN_STATUS_INTERNAL_ERROR")

    suspect = attempt(FakeDevice(100, lambda n: n), step).suspect
    assert suspect is not None
    assert [frame.name for frame in traceback.extract_tb(suspect.__traceback__)][-1] == "step"


def test_no_step_is_left_out_because_gradients_overflow() -> None:
    """What the optimizer creates is part of a trial, and training's first scale is often too large."""
    weight = torch.nn.Parameter(torch.full((4,), 1e30))
    optimizer, scaler = torch.optim.Adam([weight]), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    states: list[int] = []

    def step(n: int) -> None:
        scaler.scale((weight * 1e30).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        states.append(len(optimizer.state))

    workload = Workload.from_step(step, state=[weight, optimizer, scaler])
    assert run_trial(workload, FakeDevice(100, lambda n: n), request()).trial.fits
    assert states == [1, 1, 1]


def test_a_scaler_that_is_disabled_is_left_alone() -> None:
    """As ``GradScaler(enabled=use_amp)`` is without."""
    weight, scaler = torch.nn.Parameter(torch.ones(4)), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.Adam([weight])

    def step(n: int) -> None:
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    workload = Workload.from_step(step, state=[weight, optimizer, scaler])
    assert run_trial(workload, FakeDevice(100, lambda n: n), request()).trial.fits


def test_memory_that_runs_out_while_a_trial_is_looked_at_is_out_of_memory() -> None:
    class Tight(FakeDevice):
        def measure(self) -> Measurement:
            raise MemoryError

    trial = attempt(Tight(39, lambda n: 10 * n)).trial
    assert (trial.outcome, trial.message) == (Outcome.OOM, "MemoryError")
