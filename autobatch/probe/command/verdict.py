"""What a run of a command means: from what its processes told, and how it ended, to an attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from autobatch.device.oom import Tier, classify_exit
from autobatch.errors import DeviceCorruptedError, WorkloadFailedError
from autobatch.probe.command.run import Ending
from autobatch.probe.trial import Attempt, Progress, TrialRequest, judge
from autobatch.result import Measurement, Outcome, Trial

SHRANK = "the command caught it and went on: its own batch shrank"

_ONLY = "its data set has only"
_ENDED = "it ended without a step, as one does whose data set is smaller than the batch"
_NOT_REACHED = "autobatch reached no Python process of it (a flag -I, -E or -S, an `env -i`, or no Python in it?)"
_WORST_FIRST = (Outcome.OOM, Outcome.LIMIT, Outcome.OVER_HEADROOM, Outcome.THRASHED, Outcome.FITS)

Report = Mapping[str, Any]


def attempt_of(request: TrialRequest, ending: Ending, *, kind: str, killed: bool, smaller_fitted: bool) -> Attempt:
    """The attempt that ``ending`` was. Of several ranks, the worst decides.

    Args:
        kind: where it was to train: ``"cuda"`` or ``"cpu"``.
        killed: whether the kernel killed a process for lack of memory in the meantime.
        smaller_fitted: whether a smaller size has made its steps.

    Raises:
        WorkloadFailedError: if the command failed for a reason that is not memory, or made no step.
        DeviceCorruptedError: if the device's context broke.
    """
    failures = [report["failure"] for report in ending.reports if report.get("failure", {}).get("tier")]
    worst = min((Tier(failure["tier"]) for failure in failures), key=list(Tier).index, default=None)
    if worst is not None:
        message = next(failure["message"] for failure in failures if failure["tier"] == worst.value)
        return _failed(request, ending, worst, message)
    caught = next((report["caught"] for report in ending.reports if "caught" in report), None)
    if caught is not None:
        return _failed(request, ending, Tier.DEFINITE, f"{caught}: {SHRANK}")
    if (attempt := _refused(request, ending)) is not None:
        return attempt
    lost = [report for report in ending.reports if report["steps"] and not report["done"]]
    trained = [report for report in ending.reports if report["steps"]]
    is_whole = bool(trained) and len(trained) >= max(report["ranks"] for report in trained)
    if not is_whole or (lost and ending.code != 0):
        return _without_measurement(request, ending, kind=kind, killed=killed, smaller_fitted=smaller_fitted)
    return _measured(request, ending, trained, kind)


def is_end_of_data(trial: Trial) -> bool:
    """Whether a command's ``trial`` failed because its data set has no more samples."""
    return trial.outcome is Outcome.LIMIT and trial.message.startswith((_ONLY, _ENDED))


def _measured(request: TrialRequest, ending: Ending, trained: list[Report], kind: str) -> Attempt:
    if kind == "cuda" and not any(str(report["device"]).startswith("cuda") for report in trained):
        _fail(request, ending, "it trained on the CPU, not on the GPU: say on its command line where it should")
    shares = [report["samples"] for report in trained if report.get("samples") is not None]
    if shares and max(shares) < request.batch_size:
        message = f"{_ONLY} {max(shares)} samples"
        return Attempt(trial=_trial(request, trained, Tier.LIMIT, message))
    largest = max(trained, key=lambda report: report.get("peak_reserved_bytes") or 0)
    return Attempt(trial=_trial(request, trained, None, ""), trace=ending.traces.get(largest["pid"]))


def _refused(request: TrialRequest, ending: Ending) -> Attempt | None:
    """What it means that memory was refused and the command caught that, if it did: it ended in another way then."""
    error = next((report["refused"] for report in ending.reports if "refused" in report and not report["done"]), None)
    if error is None:
        return None
    told = next((report["failure"] for report in ending.reports if "failure" in report), None)
    if told is not None:  # which may have had nothing to do with it
        return _failed(request, ending, Tier.SUSPECT, f"{error}, and then {told['type']}: {told['message']}")
    return _failed(request, ending, Tier.DEFINITE, f"{error}: the command caught it and made no step after it")


def _without_measurement(
    request: TrialRequest, ending: Ending, *, kind: str, killed: bool, smaller_fitted: bool
) -> Attempt:
    """What it means that a run ended before it was measured, with no error that says so."""
    number = -ending.code if ending.code is not None and ending.code < 0 else 0
    tier = classify_exit(number or 9 * killed, memory_exhausted=killed or (kind == "cpu" and number != 9))
    if tier is not None:
        return _failed(request, ending, tier, f"a process of the command was killed by signal {number or 9}")
    if ending.silent:
        made = max((report["steps"] for report in ending.reports), default=0)
        _fail(request, ending, f"it made {'no further' if made else 'no'} optimizer step within its time")
    if not ending.reports:
        how = "" if ending.code is None else f"it ended with exit code {ending.code}, and "
        _fail(request, ending, f"{how}{_NOT_REACHED}")
    if ending.code == 0 and smaller_fitted:
        return Attempt(trial=_trial(request, [], Tier.LIMIT, _ENDED))
    told = [report["failure"] for report in ending.reports if "failure" in report]
    reason = f": {told[0]['type']}: {told[0]['message']}" if told else ""
    made = max(report["steps"] for report in ending.reports)
    how = f"it ended with exit code {ending.code}" if ending.code is not None else "a process of it was lost"
    when = f"after {made} of {request.steps} optimizer steps" if made else "before any optimizer step"
    _fail(request, ending, f"{how} {when}{reason}")


def _failed(request: TrialRequest, ending: Ending, tier: Tier, message: str) -> Attempt:
    if tier is Tier.FATAL:
        raise DeviceCorruptedError(f"batch {request.batch_size}: {message}")
    trial = _trial(request, list(ending.reports), tier, message)
    suspect = WorkloadFailedError(message, request.batch_size, ending.tail) if tier is Tier.SUSPECT else None
    return Attempt(trial=trial, suspect=suspect)


def _fail(request: TrialRequest, ending: Ending, message: str) -> NoReturn:
    raise WorkloadFailedError(
        f"batch {request.batch_size}: {message}. Its whole output is in {ending.log}", request.batch_size, ending.tail
    )


def _trial(request: TrialRequest, reports: list[Report], tier: Tier | None, message: str) -> Trial:
    trials = [_judged(request, report, tier) for report in reports if "device" in report]
    trials = trials or [judge(request, Progress(), None, tier, compare_peaks=False)]
    worst = min(trials, key=lambda trial: _WORST_FIRST.index(trial.outcome))
    peaks = [trial.measurement for trial in trials if trial.measurement is not None]
    measured = max(peaks, key=lambda peak: peak.peak_allocated_bytes or 0, default=None)
    return replace(worst, measurement=measured, message=message or worst.message)


def _judged(request: TrialRequest, report: Report, tier: Tier | None) -> Trial:
    progress = Progress()
    progress.step_times_s = report.get("step_times_s", [])
    progress.retries = report.get("retries", [])
    measured = Measurement(
        peak_allocated_bytes=report.get("peak_allocated_bytes"),
        peak_reserved_bytes=report.get("peak_reserved_bytes"),
        device_used_bytes=report.get("device_used_bytes"),
        capacity_bytes=request.limit_bytes,
    )
    trial = judge(request, progress, measured, tier, compare_peaks=report.get("compare_peaks", False))
    if len(progress.step_times_s) < 2 and trial.measurement is not None:
        # The first step is counted from the start of the process.
        trial = replace(trial, measurement=replace(trial.measurement, step_time_s=None))
    return trial
