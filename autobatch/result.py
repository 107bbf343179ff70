"""What a search found, in frozen records that go to JSON and back.

No torch here, and no device: everything is a number, a string or one of these records.
Bytes are ``int``, seconds ``float``; ``None`` means unknown, which is never zero.
"""

from __future__ import annotations

import enum
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autobatch.errors import InvalidArgumentError
from autobatch.units import format_bytes, format_seconds

FORMAT_VERSION = 1
FRESH = "a fresh start"
"""The ``history`` of a run in a process that ran nothing before, as training begins."""
AFTER_SEARCH = "the search itself"
"""The ``history`` of a run in the process that searched."""
SHUFFLED = "shuffled epoch"
"""How the ``history`` of a run that took shuffled batches begins; its number follows."""
PROOFS = ("next_size_failed", "stepped_down", "max_batch_size", "dataset", "memory_model", "time_limit")


class Outcome(enum.Enum):
    """What became of one batch size. Only ``FITS`` is a size to train at."""

    FITS = "fits"
    OVER_HEADROOM = "over_headroom"  # it ran, but took more than it may have
    THRASHED = "thrashed"  # it ran, but the allocator had to free and retry in every step
    OOM = "oom"
    LIMIT = "limit"  # a kernel's size limit, not memory: caps the search


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one trial measured. Peaks are over all its steps, all in bytes; times in seconds."""

    peak_allocated_bytes: int | None
    """Largest sum of live tensors, as the allocator rounds them."""
    peak_reserved_bytes: int | None
    """Largest sum of memory the allocator took from the device."""
    device_used_bytes: int | None = None
    """What the whole device had in use after the steps, other processes included."""
    capacity_bytes: int | None = None
    """What this trial was allowed: the budget less the headroom (of host memory half a per cent or 3 MiB at least)."""
    alloc_retries: int | None = None
    """Times the allocator had to give cached memory back and try again, in the judged steps."""
    step_time_s: float | None = None
    """Median time of a judged step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One batch size that was tried."""

    batch_size: int
    outcome: Outcome
    measurement: Measurement | None = None
    duration_s: float = 0.0
    message: str = ""
    """For a person: the error's first line, or what was noticed. Empty when there is nothing to say."""
    steps: int = 0
    """Steps that ran to their end."""
    mode: str = "train"
    """``train`` or ``eval``."""
    history: str = ""
    """For a run that confirms an answer: what ran before it. Empty for the search's own trials."""

    @property
    def fits(self) -> bool:
        return self.outcome is Outcome.FITS


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizeResult:
    """The answer of a search. ``str()`` prints it as a table, ``repr()`` as one line.

    ``batch_size`` was run: it is in ``trials``, or in ``confirmation`` alone where a larger size was not confirmed or
    where trials of others had told that memory ends there.
    ``proof`` says why the search stopped there: ``next_size_failed`` (the next permitted size does not fit),
    ``stepped_down`` (``smallest_failure`` was not confirmed, and not every size between was tried),
    ``max_batch_size`` or ``dataset`` (a cap was reached), ``memory_model`` (the caller chose to provoke no failure),
    ``time_limit``.
    """

    batch_size: int
    proof: str
    smallest_failure: int | None
    """The smallest size above ``batch_size`` that was seen not to fit."""
    trials: tuple[Trial, ...]
    """Every size tried, in the order tried."""
    confirmation: tuple[Trial, ...] = ()
    """The runs in confirming, one for each history of each candidate; together they count as one trial. Empty where a
    remembered answer was confirmed by a trial."""
    eval_batch_size: int | None = None
    """The largest size for evaluation, where the workload has one."""
    headroom: float = 0.0
    budget_bytes: int | None = None
    """What the device had for this workload, before the headroom was withheld."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Device, driver and versions; ``virtual`` says whether the GPU was one that is not there."""
    notes: tuple[str, ...] = ()
    """Sentences for a person: what was stepped down, what would let more fit."""
    duration_s: float = 0.0
    format_version: int = FORMAT_VERSION

    @property
    def trial_count(self) -> int:
        """Trials of the search, the confirmation counted as one."""
        return len(self.trials) + bool(self.confirmation)

    @property
    def oom_count(self) -> int:
        """Out-of-memory failures provoked, in the search and in confirming."""
        return sum(t.outcome is Outcome.OOM for t in (*self.trials, *self.confirmation))

    @property
    def samples_processed(self) -> int:
        """Samples of the search alone; those of the confirmation are counted apart."""
        return sum(t.batch_size * t.steps for t in self.trials)

    @property
    def peak_fraction(self) -> float | None:
        """Peak allocated bytes at the answer over the budget; None where they are unknown or count different things."""
        peaks = [run.peak_allocated_bytes for run in self.answer_measurements() if run.peak_allocated_bytes is not None]
        if not peaks or not self.budget_bytes or self.environment.get("kind") == "cpu":
            return None
        return max(peaks) / self.budget_bytes

    def answer_measurements(self) -> list[Measurement]:
        """What was measured at ``batch_size`` where it fitted, in the search and in confirming it."""
        runs = [t for t in (*self.trials, *self.confirmation) if t.batch_size == self.batch_size and t.fits]
        return [t.measurement for t in runs if t.measurement is not None and t.mode == self.trials[0].mode]

    @property
    def conclusion(self) -> str:
        """The answer in one line, for a person."""
        return _conclusion(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """This result as JSON text; :meth:`from_json` reads it back to an equal record."""
        plain = asdict(self)
        for trial in (*plain["trials"], *plain["confirmation"]):
            trial["outcome"] = trial["outcome"].value
        return json.dumps(plain, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> BatchSizeResult:
        """The result that ``text`` holds.

        Raises:
            InvalidArgumentError: if ``text`` is not a result, or one of another format version.
        """
        try:
            plain = json.loads(text)
            version = plain["format_version"]
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidArgumentError("text", text[:80], "a BatchSizeResult in JSON") from exc
        if version != FORMAT_VERSION:
            raise InvalidArgumentError("format_version", version, f"{FORMAT_VERSION}, the one this autobatch writes")
        try:
            for name in ("trials", "confirmation"):
                plain[name] = tuple(_trial_from(t) for t in plain[name])
            return cls(**{**plain, "notes": tuple(plain["notes"])})
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidArgumentError("text", text[:80], f"a BatchSizeResult in JSON ({exc})") from exc

    def __repr__(self) -> str:
        name = self.environment.get("device", "unknown device")
        return (
            f"BatchSizeResult(batch_size={self.batch_size}, proof={self.proof!r}, trials={self.trial_count}, "
            f"failures={self.oom_count}, device={name!r}{', virtual=True' if self.environment.get('virtual') else ''})"
        )

    def __str__(self) -> str:
        return "\n".join([*_table(self), "", _conclusion(self), *self.notes])


def _trial_from(plain: dict[str, Any]) -> Trial:
    measured = plain["measurement"]
    return Trial(
        **{
            **plain,
            "outcome": Outcome(plain["outcome"]),
            "measurement": Measurement(**measured) if measured else None,
        }
    )


def _table(result: BatchSizeResult) -> list[str]:
    timed = not result.environment.get("virtual", False)  # nothing is computed there, so times say nothing
    lines = [f"{'batch':>8}  {'outcome':<13}  {'allocated':>10}  {'reserved':>10}" + f"  {'step':>8}" * timed]
    unknown = Measurement(peak_allocated_bytes=None, peak_reserved_bytes=None)
    for trial in folded((*result.trials, *result.confirmation)):
        measured = trial.measurement or unknown
        allocated, reserved = measured.peak_allocated_bytes, measured.peak_reserved_bytes
        line = f"{trial.batch_size:>8}  {trial.outcome.value:<13}"
        line += f"  {format_bytes(allocated):>10}  {format_bytes(reserved):>10}"
        line += f"  {format_seconds(measured.step_time_s):>8}" * timed
        mode = f"  {trial.mode}" if trial.mode != "train" else ""
        lines.append(line + mode + (f"  confirming after {trial.history}" if trial.history else ""))
    return lines


def folded(trials: Iterable[Trial]) -> list[Trial]:
    """``trials`` for a person: shuffled epochs that the same size survived are one row, that of the highest peak."""
    rows: list[Trial] = []
    for survived, run in itertools.groupby(trials, key=_shuffled_and_fits):
        same = list(run)
        if survived is None or len(same) == 1:
            rows += same
        else:
            highest = max(same, key=lambda t: (t.measurement and t.measurement.peak_reserved_bytes) or 0)
            took_s = sum(trial.duration_s for trial in same)
            rows.append(replace(highest, duration_s=took_s, history=f"{len(same)} {SHUFFLED}s"))
    return rows


def _shuffled_and_fits(trial: Trial) -> tuple[int, str] | None:
    return (trial.batch_size, trial.mode) if trial.fits and trial.history.startswith(SHUFFLED) else None


def _cap_reached(result: BatchSizeResult) -> str:
    effective, ranks = result.environment.get("effective_batch_size"), result.environment.get("ranks", 1)
    if effective is not None and result.batch_size * ranks >= effective:
        return f"an effective batch of {effective} takes no more"
    return "the largest size allowed"


def _conclusion(result: BatchSizeResult) -> str:
    device = result.environment.get("device", "an unknown device")
    if result.environment.get("virtual"):
        device = f"{device} (virtual)"
    ran = (*result.trials, *result.confirmation)
    fitted_once = any(trial.fits and trial.batch_size == result.smallest_failure for trial in ran)
    reasons = {
        "next_size_failed": f"{result.smallest_failure} {'did not keep fitting' if fitted_once else 'does not fit'}",
        "stepped_down": f"{result.smallest_failure} did not keep fitting",
        "max_batch_size": _cap_reached(result),
        "dataset": "the data set has no more samples",
        "memory_model": "the memory model allows no more without risking a failure",
        "time_limit": "the time limit was reached",
    }
    return f"Largest batch on {device}: {result.batch_size} ({reasons.get(result.proof, result.proof)})"
