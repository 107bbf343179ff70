"""One question to one place: a search and its confirmation, from the requests they make to the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from autobatch.device.oom import first_line
from autobatch.errors import DoesNotFitError
from autobatch.probe.advice import fragmentation_notes, malloc_notes, order_notes
from autobatch.probe.executor import Executor, Setting
from autobatch.probe.foresight import Recorded
from autobatch.probe.search import SearchAnswer
from autobatch.probe.search.within import search_within
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.replay.forecast import Forecast
from autobatch.result import FRESH, SHUFFLED, BatchSizeResult, Trial
from autobatch.units import MIB, format_bytes

CONFIRM_STEPS = 20
"""Steps of a confirming run: enough to meet failures that come late, in the second step or in a later one."""

SHUFFLES, SHUFFLES_AT_THE_EDGE = 8, 20
"""Shuffled orders that an answer must survive where samples are of different lengths. Without headroom no margin covers
an order that was not tried."""


FRESH_AT_THE_EDGE = 3
"""Fresh processes that an answer must survive without headroom where no two processes are alike, as on host memory."""

HEAPS_DIFFER_BYTES, LEAST_WITHHELD, LEAST_OF_LITTLE = 3 * MIB, 0.005, 0.025
"""By how much what malloc keeps differs between the processes of a search and others (benchmarks/peers.py, three
workloads: up to 3 MiB); so much is withheld without headroom all the same, half a per cent at least, and of a small
limit no more than a fortieth."""


@dataclass(kw_only=True)
class Inquiry:
    """One call of find(), once its device and its workload are there."""

    executor: Executor
    setting: Setting
    first_size: int
    """Where growth begins: the smallest size that the workload is known to accept."""
    steps: int
    shuffles: int
    fresh: int
    """How many fresh processes confirm a candidate."""
    capacity_bytes: int | None
    """What the trials may have here."""
    least_capacity_bytes: int | None
    """What they may have on the rank that has the least."""
    is_restricted: bool
    on_trial: Callable[[Trial], None] | None
    clock: Callable[[], float] = time.monotonic
    """Seconds, for a limit of time."""
    agree_forecast: Callable[[Forecast | None], Forecast | None] = lambda own: own
    """What a forecast means where other ranks have theirs."""
    records: bool = True
    """Whether trials are recorded, to tell from them what sizes need that were never run."""
    smallest: int | None = None
    """The smallest batch that ran in another place; None if none did."""
    trials: list[Trial] = field(default_factory=list, init=False)
    confirmation: list[Trial] = field(default_factory=list, init=False)
    _suspects: dict[int, BaseException] = field(default_factory=dict, init=False)
    _doubts: list[str] = field(default_factory=list, init=False)
    _checked: dict[tuple[int, str], Attempt] = field(default_factory=dict, init=False)
    """By size and mode: trials of a remembered answer, which the search need not repeat."""
    _foresight: Recorded | None = field(default=None, init=False)
    """What the trials of the search that runs tell of others; None where they are not recorded."""
    _trained: int | None = field(default=None, init=False)
    """The batch that training takes, where evaluation comes amid it."""

    def elsewhere(self, executor: Executor) -> Inquiry:
        """The same question to another place, with nothing asked yet and nobody told. It may have more memory there."""
        return Inquiry(
            executor=executor,
            setting=executor.setting(),
            first_size=self.first_size,
            steps=self.steps,
            shuffles=self.shuffles,
            fresh=self.fresh,
            capacity_bytes=self.capacity_bytes,
            least_capacity_bytes=self.capacity_bytes,
            is_restricted=True,
            on_trial=None,
        )

    def look(self, size: int) -> None:
        """Runs one step of each kind in which a collective is an error. Whether it fits is not asked yet."""
        for mode in ("train", "eval") if self.setting.mode == "both" else (self.setting.mode,):
            extent = self.setting.data.get(mode)
            most = size if extent is None else min(size, extent.samples)
            self.executor.run(replace(self._request(most, mode, 1, ()), refuses_collectives=True))

    def search(
        self, options: dict[str, Any], *, first_guess: int | None, ceiling: int | None = None
    ) -> dict[str, SearchAnswer]:
        """An answer for each mode of the workload. Evaluation comes second, for training is what it runs amid.

        ``first_guess`` and ``ceiling`` are about the first.
        """
        answers: dict[str, SearchAnswer] = {}
        for mode in ("train", "eval") if self.setting.mode == "both" else (self.setting.mode,):
            self._suspects.clear()
            self._trained = answers["train"].batch_size if answers else None
            self._foresight = Recorded(self.capacity_bytes, self.steps, self.agree_forecast) if self.records else None
            try:
                answers[mode] = search_within(
                    self.setting.data.get(mode),
                    lambda size, mode=mode: self._ask(size, mode),  # type: ignore[misc]
                    lambda size, mode=mode: self._confirm(size, mode),  # type: ignore[misc]
                    capacity_bytes=self.least_capacity_bytes,
                    clock=self.clock,
                    first_guess=self._trained or first_guess,
                    ceiling=None if self._trained else ceiling,
                    foresight=self._foresight,
                    **options,
                )
            except DoesNotFitError as error:
                raise self._explained(error) from None
            self._doubts += of_mode(mode, self._doubtful())
        return answers

    def result(
        self, answers: dict[str, SearchAnswer], headroom: float, limit_bytes: int | None, duration_s: float
    ) -> BatchSizeResult:
        answer = next(iter(answers.values()))
        result = BatchSizeResult(
            batch_size=answer.batch_size,
            proof=answer.proof,
            smallest_failure=answer.smallest_failure,
            trials=tuple(self.trials),
            confirmation=tuple(self.confirmation),
            eval_batch_size=answers["eval"].batch_size if "eval" in answers else None,
            headroom=headroom,
            budget_bytes=least(self.setting.budget_bytes, limit_bytes),
            environment={**self.setting.environment, "workload": self.setting.name, "trials_in": self.executor.where},
            notes=(*(note for mode, found in answers.items() for note in of_mode(mode, found.notes)), *self._doubts),
            duration_s=duration_s,
        )
        further = (*fragmentation_notes(result), *malloc_notes(result), *order_notes(result))
        return replace(result, notes=(*result.notes, *further))

    def _ask(self, size: int, mode: str) -> Trial:
        checked = self._checked.pop((size, mode), None)
        attempt = checked or self.executor.run(self._searching(size, mode))
        if self._foresight is not None:
            self._foresight.learn(attempt)
        if attempt.suspect is not None:
            self._suspects[size] = attempt.suspect
        if checked is None:
            self.trials.append(self._told(attempt.trial))
        return attempt.trial

    def _searching(self, size: int, mode: str) -> TrialRequest:
        """A trial of the search, behind small batches where these are what it is foretold to fail behind."""
        # One sample is enough for an evaluation to meet the optimizer's state.
        before = () if self._trained is None else (self._small("train", self._trained),)
        if self._foresight is None:
            return self._request(size, mode, self.steps, before)
        if self.executor.begins_small and self._foresight.belongs_behind_small(size):
            before = (*before, *self._two_small(size, mode))
            return self._request(size, mode, self.steps, before)
        request = self._request(size, mode, self.steps, before)
        return replace(request, records=self._foresight.wants(), afresh=self._foresight.is_at_the_end(size))

    def check(self, size: int, mode: str) -> Trial:
        """One trial of a remembered answer, as a fresh start."""
        attempt = self.executor.confirm((self._fresh(size, mode),))[-1]
        self._checked[size, mode] = attempt
        self.trials.append(self._told(attempt.trial))
        self._trained = size if (self.setting.mode, mode) == ("both", "train") else None
        return attempt.trial

    def _fresh(self, size: int, mode: str) -> TrialRequest:
        if self._trained is None:
            return replace(self._request(size, mode, CONFIRM_STEPS, ()), history=FRESH)
        return replace(self._request(size, mode, CONFIRM_STEPS, (self._trained,)), history="a batch of training")

    def _confirm(self, size: int, mode: str) -> Trial:
        fresh = self._fresh(size, mode)
        before = (*fresh.sizes_before, *self._two_small(size, mode))
        after_small = replace(fresh, history="smaller batches", sizes_before=before)
        extent = self.setting.data.get(mode)
        seeds = range(self.shuffles if extent is not None and extent.varies else 0)
        shuffled = [replace(fresh, history=f"{SHUFFLED} {seed + 1}", shuffle_seed=seed) for seed in seeds]
        attempts = self.executor.confirm((*[fresh] * self.fresh, after_small, *shuffled))
        self.confirmation += [self._told(attempt.trial) for attempt in attempts]
        if attempts[-1].suspect is not None:
            self._suspects.setdefault(size, attempts[-1].suspect)
        return attempts[-1].trial

    def _two_small(self, size: int, mode: str) -> tuple[int, int]:
        """The small batches that come before one of ``size``, as the last of an epoch may."""
        small = self._small(mode, size) if self._trained is None else self._small("train", self._trained)
        return small, small

    def _small(self, mode: str, size: int) -> int:
        """A batch smaller than ``size``: one sample, unless the caller started higher (batch norm refuses one).

        A search that began at a guess need not have run so few, and goes no further down than two, unless fewer ran
        elsewhere.
        """
        ran = [trial.batch_size for trial in self.trials if trial.fits and trial.mode == mode]
        return min(size, max(self.first_size, 2), *ran, *(() if self.smallest is None else (self.smallest,)))

    def _request(self, size: int, mode: str, steps: int, before: tuple[int, ...]) -> TrialRequest:
        limit_bytes = self.capacity_bytes if self.is_restricted else None
        return TrialRequest(batch_size=size, steps=steps, limit_bytes=limit_bytes, mode=mode, sizes_before=before)

    def _told(self, trial: Trial) -> Trial:
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial

    def _doubtful(self) -> tuple[str, ...]:
        """Names the smallest failure that was not surely one of memory."""
        if not self._suspects:
            return ()
        size, error = min(self._suspects.items(), key=lambda known: known[0])
        return (f"A batch of {size} is taken to run out of memory because smaller ones pass: {first_line(error)}.",)

    def _explained(self, error: DoesNotFitError) -> BaseException:
        """What to raise when nothing fits: the workload's own error, unless it was surely about memory."""
        size = error.trial.batch_size if error.trial else 1
        if size in self._suspects:
            return self._suspects[size]
        device = self.setting.environment.get("device", "the device")
        what = f"{'an evaluation of ' if error.trial is not None and error.trial.mode == 'eval' else ''}batch {size}"
        held_bytes = self.setting.held_bytes
        message = f"{what} does not fit on {device} in {format_bytes(self.least_capacity_bytes)}"
        if held_bytes is not None:
            message += f", of which the model alone holds {format_bytes(held_bytes)}"
        if error.trial is not None and error.trial.message:
            message += f": {error.trial.message}"
        return DoesNotFitError(message, error.trial)


def capacity(setting: Setting, limit_bytes: int | None, headroom: float) -> int | None:
    """What the trials may have: the budget or the user's limit, less the headroom."""
    budget_bytes = least(setting.budget_bytes, limit_bytes)
    if budget_bytes is None:
        return None
    capacity_bytes = math.floor(budget_bytes * (1 - headroom))
    held_bytes = setting.held_bytes or 0
    if capacity_bytes <= held_bytes:
        raise DoesNotFitError(
            f"the model alone needs {held_bytes} bytes ({format_bytes(held_bytes)}); {capacity_bytes} bytes "
            f"({format_bytes(capacity_bytes)}) are allowed"
        )
    return capacity_bytes


def withheld_of_host(limit_bytes: int | None) -> float:
    """The part of host memory that no headroom may fall below."""
    if not limit_bytes:
        return LEAST_WITHHELD
    return max(LEAST_WITHHELD, min(LEAST_OF_LITTLE, HEAPS_DIFFER_BYTES / limit_bytes))


def of_mode(mode: str, notes: tuple[str, ...]) -> list[str]:
    """``notes``, said to be about evaluation where they are: training is not to blame for them."""
    return [f"Evaluation: {note[0].lower()}{note[1:]}" if mode == "eval" else note for note in notes]


def least(*sizes: int | None) -> int | None:
    known = [size for size in sizes if size is not None]
    return min(known) if known else None
