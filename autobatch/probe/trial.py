"""One batch size on one device, in this process: from a number to a :class:`~autobatch.result.Trial`."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from autobatch.device.base import Device
from autobatch.device.oom import Tier, classify, first_line, forget_frames
from autobatch.errors import DeviceCorruptedError
from autobatch.probe.collectives import RefusingCollectives
from autobatch.probe.workload import Workload
from autobatch.probe.workload.data import Batches
from autobatch.replay.forecast import thrashes
from autobatch.replay.trace import Trace
from autobatch.result import Measurement, Outcome, Trial
from autobatch.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """What to try. ``limit_bytes`` is what the workload can have in all, None for whatever the device has."""

    batch_size: int
    steps: int
    limit_bytes: int | None = None
    mode: str = "train"
    sizes_before: tuple[int, ...] = ()
    """Batches to run first, under the same limit: the history that the size must survive. They are trained, unless
    the workload is one of evaluation alone."""
    shuffle_seed: int | None = None
    """If given, the steps take shuffled batches of the data set, and one more step takes the worst. What the optimizer
    allocates amid small batches stays between what the large ones need."""
    history: str = ""
    """A name for that history; empty for a trial of the search."""
    refuses_collectives: bool = False
    """Whether a collective is an error: in a process that cannot be lost, it would wait for a rank that has failed."""
    afresh: bool = False
    """Whether a process that has tried nothing before is to run it, where trials have processes of their own."""
    records: bool = False
    """Whether to record what the steps allocate, where the device can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A trial, and the workload's exception where only a smaller size that fits can tell that it meant memory."""

    trial: Trial
    suspect: BaseException | None = None
    trace: Trace | None = None
    """What the steps allocated, where that was recorded and they ran to their end."""


class Progress:
    """What a run has done so far, kept outside the frames that a failure unwinds."""

    def __init__(self) -> None:
        self.step_times_s: list[float] = []
        self.retries: list[int | None] = []
        self.trace: Trace | None = None


def run_trial(workload: Workload, device: Device, request: TrialRequest) -> Attempt:
    """Runs ``request`` and says what became of it. Afterwards nothing of it is alive and the caches are empty, as it
    expects to find them. What its steps changed, a loss's scale among it, is for the caller to put back.

    Every exception that does not mean "out of memory" is raised unchanged, and so is a broken device context, as
    :class:`~autobatch.errors.DeviceCorruptedError`.
    """
    started_s = time.monotonic()
    try:
        attempt, streams = _run_once(workload, device, request)
    except MemoryError as exc:  # who looks at a trial on host memory needs some too, under the same limit
        forget_frames(exc)
        lost = judge(request, Progress(), None, Tier.DEFINITE, compare_peaks=False)
        attempt, streams = Attempt(trial=replace(lost, message=first_line(exc))), None
        clean_up(workload, device)
    if attempt.trial.outcome is Outcome.OOM and streams is not None and streams > 1:
        # torch can give up although what another stream has just freed is enough (pytorch#189504).
        attempt, _ = _run_once(workload, device, request)
    return replace(attempt, trial=replace(attempt.trial, duration_s=time.monotonic() - started_s))


def _run_once(workload: Workload, device: Device, request: TrialRequest) -> tuple[Attempt, int | None]:
    """The attempt, and how many streams had memory when it ended."""
    progress, failure, measured = Progress(), None, None
    with device.restrict(request.limit_bytes) as restricted:
        device.reset_peaks()
        try:
            with RefusingCollectives() if request.refuses_collectives else nullcontext():
                _run_steps(workload, device, request, progress)
        except Exception as exc:  # noqa: BLE001 - classified below: what is not memory is raised unchanged
            failure = exc
        # Measured outside the except block: inside, the traceback would keep the failed step's tensors alive.
        tier = None if failure is None else classify(failure)
        if failure is None or tier is not None:
            measured = replace(device.measure(), capacity_bytes=request.limit_bytes or device.budget_bytes())
        streams = device.streams() if tier is Tier.DEFINITE else None
        if failure is not None and tier is not None:
            forget_frames(failure, places_too=tier not in (Tier.SUSPECT, Tier.FATAL))
        clean_up(workload, device)
    if failure is not None and tier is None:
        raise failure
    if failure is not None and tier is Tier.FATAL:
        raise DeviceCorruptedError(f"batch {request.batch_size}: {first_line(failure)}") from failure
    trial = judge(request, progress, measured, tier, compare_peaks=not restricted)
    if failure is not None and not trial.message:
        trial = replace(trial, message=first_line(failure))
    suspect = failure if tier is Tier.SUSPECT else None
    return Attempt(trial=trial, suspect=suspect, trace=progress.trace), streams


def clean_up(workload: Workload, device: Device) -> None:
    """Lets go of what a step left alive and gives the caches back, so that every trial starts from the same place."""
    workload.forget()
    gc.collect()
    device.release()


def _run_steps(workload: Workload, device: Device, request: TrialRequest, progress: Progress) -> None:
    step = workload.eval_step if request.mode == "eval" else workload.train_step
    before = workload.eval_step if workload.mode == "eval" else workload.train_step
    if workload.mode != "eval":
        workload.scale_by_one()
    for size in request.sizes_before:
        before(size)
    if request.sizes_before:
        device.reset_peaks()
    with device.recording() if request.records else nullcontext() as recording:
        for sample in _samples(workload, request):
            started_s = time.perf_counter()
            step(request.batch_size, sample)
            device.synchronize()
            progress.step_times_s.append(time.perf_counter() - started_s)
            progress.retries.append(device.retries())
            if recording is not None:
                recording.step_ended()
        progress.trace = None if recording is None else recording.finish()


def _samples(workload: Workload, request: TrialRequest) -> list[Batches | None]:
    """Where each step takes its batch from; None is the worst case."""
    if request.shuffle_seed is None:
        return [workload.shorter(), *[None] * (request.steps - 1)]
    shuffled = workload.shuffled(request.shuffle_seed)
    return [*[shuffled] * request.steps, None]


def judge(
    request: TrialRequest,
    progress: Progress,
    measured: Measurement | None,
    tier: Tier | None,
    *,
    compare_peaks: bool,
) -> Trial:
    """The trial that a run was: ``tier`` is what its error said about memory, None where it had none."""
    message, outcome = "", Outcome.FITS
    retries = _judged_retries(progress.retries)
    if measured is not None:
        judged_s = progress.step_times_s[1:] or progress.step_times_s
        measured = replace(
            measured, alloc_retries=retries, step_time_s=statistics.median(judged_s) if judged_s else None
        )
    if tier is not None:
        outcome = Outcome.LIMIT if tier is Tier.LIMIT else Outcome.OOM
    elif compare_peaks and measured is not None and (over := _over(measured)):
        outcome, message = Outcome.OVER_HEADROOM, f"it ran, and took {over}"
    elif thrashes([count for count in progress.retries if count is not None]):
        outcome, message = Outcome.THRASHED, f"it ran, and the allocator had to free and retry {retries} times"
    return Trial(
        batch_size=request.batch_size,
        outcome=outcome,
        measurement=measured,
        message=message,
        steps=len(progress.step_times_s),
        mode=request.mode,
        history=request.history,
    )


def _judged_retries(retries: Sequence[int | None]) -> int | None:
    """Retries in the steps after the first, which alone creates the optimizer's state."""
    if len(retries) < 2 or retries[0] is None or retries[-1] is None:
        return None
    return retries[-1] - retries[0]


def _over(measured: Measurement) -> str:
    """By how much the peak is above what the workload can have, in words; empty if it is not."""
    # The larger, since what a host's workload finds in the holes of a heap is resident and was reserved before.
    peaks_bytes = (measured.peak_allocated_bytes, measured.peak_reserved_bytes)
    peak_bytes = max((peak for peak in peaks_bytes if peak is not None), default=0)
    capacity_bytes = measured.capacity_bytes
    if capacity_bytes is None or peak_bytes <= capacity_bytes:
        return ""
    return f"{format_bytes(peak_bytes)} where it can have {format_bytes(capacity_bytes)}"
