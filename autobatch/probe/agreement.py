"""What the ranks of a job agree on while each tries the same sizes in a place of its own.

Ranks go the same way because they know the same: every attempt is exchanged before anything is decided by it, and all
of them take the worst for their own. Nobody waits for a rank that has failed: what it raises is its part of the
exchange in which the others are, or of the next one that they come to.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from autobatch.device.oom import first_line
from autobatch.errors import AutobatchError, DoesNotFitError, InvalidArgumentError, RankError, WorkloadFailedError
from autobatch.probe.executor import Setting
from autobatch.probe.processes.errors import StrandedError
from autobatch.probe.processes.messages import portable
from autobatch.probe.search.within import Extent
from autobatch.probe.state import interrupts_deferred
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.ranks import Ranks
from autobatch.replay.forecast import Forecast
from autobatch.result import BatchSizeResult, Trial

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A rank's part of one exchange."""

    at: str
    """What it is about, so that ranks that went different ways notice."""
    item: Any = None
    stranded: str = ""
    """Why there is no item, where another rank must know the reason."""
    error: str = ""
    """What this rank raises, in a line."""
    copy: AutobatchError | None = None
    """The same, if it is an error of ours."""


@dataclass(frozen=True, slots=True)
class _Tried:
    trial: Trial
    suspect: str
    is_recorded: bool


class Agreement:
    """This rank's voice among all of them; alone, everything is as it says itself.

    Args:
        ranks: who agrees.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.host = socket.gethostname()
        self.local_rank, self.local_size = 0, 1
        self._narrowest = 0
        self._is_over = not self.ranks.are_several
        self._last: list[Report] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        """Inside, what this rank raises reaches the others, as :class:`~autobatch.errors.RankError` there.

        That not even the smallest size fits is everybody's answer, and so everybody's error.
        """
        try:
            yield
        except BaseException as exc:
            if not self._is_over:
                self._is_over = True
                with suppress(RankError):  # whoever is left finds out by this rank's end
                    self._last = self.ranks.gather(_report_of(exc))
            raise

    def is_known_to(self, rank: int) -> bool:
        """Whether ``rank`` left the session with an error at the same time as this one."""
        return bool(self._last and self._last[rank].error)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Checks that all ranks were asked the same, and learns which of them share this machine.

        Raises:
            InvalidArgumentError: naming the first option that differs.
        """
        told = self.exchange("the arguments", (self.host, dict(options)))
        for name, value in options.items():
            values = [others.get(name) for _, others in told]
            if any(other != value for other in values):
                allowed = f"the same on all ranks, which have {', '.join(map(repr, values))}"
                raise InvalidArgumentError(name, value, allowed)
        here = [rank for rank, (host, _) in enumerate(told) if host == self.host]
        if self.ranks.are_several:
            self.local_rank = int(os.environ.get("LOCAL_RANK") or here.index(self.ranks.rank))
            self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or len(here))

    def exchange(self, at: str, item: T) -> list[T]:
        """What each rank gives, in their order. All must ask, and about the same.

        Raises:
            RankError: where another rank has failed, is gone or went another way.
            DoesNotFitError: where another has raised that.
        """
        return [report.item for report in self._exchanged(Report(at=at, item=item))]

    def ask(self, at: str, function: Callable[[], T]) -> list[T]:
        """As :meth:`exchange`, with what ``function`` gives, which may be stranded by another rank's failure."""
        stranded = None
        try:
            report = Report(at=at, item=function())
        except StrandedError as exc:
            if self._is_over:
                raise
            stranded, report = exc, Report(at=at, stranded=str(exc))
        reports = self._exchanged(report)
        lost = [rank for rank, other in enumerate(reports) if other.stranded]
        if lost and all(_is_well(other) for other in reports if not other.stranded):
            self._is_over = True
            if stranded is not None:
                raise stranded.__cause__ or WorkloadFailedError(str(stranded))
            raise RankError(f"rank {lost[0]} failed: {reports[lost[0]].stranded}", lost[0])
        return [other.item for other in reports]

    def attempt(self, request: TrialRequest, run: Callable[[], Attempt]) -> Attempt:
        """The worst of all ranks' attempts at ``request``: one that does not fit before one that does, and among those
        that do the one that leaves the least room. Its step took as long as on the slowest rank."""
        if not self.ranks.are_several:
            return run()
        own: list[Attempt] = []

        def tried() -> _Tried:
            own.append(attempt := run())
            said = "" if attempt.suspect is None else f"{type(attempt.suspect).__name__}: {first_line(attempt.suspect)}"
            return _Tried(attempt.trial, said, attempt.trace is not None)

        at = f"batch {request.batch_size} ({request.mode}, {request.history or 'searching'})"
        everyone = self.ask(at, tried)
        known = [rank for rank, other in enumerate(everyone) if other is not None]
        worst = max(known, key=lambda rank: (*_badness(everyone[rank]), -rank))
        chosen = everyone[worst]
        suspect = own[0].suspect if own and chosen.suspect else None
        if chosen.suspect and suspect is None:
            suspect = RankError(f"rank {worst} failed: {chosen.suspect}", worst)
        return Attempt(
            trial=_slowest(chosen.trial, [everyone[rank].trial for rank in known]),
            suspect=suspect,
            trace=own[0].trace if all(other is not None and other.is_recorded for other in everyone) else None,
        )

    def forecast(self, own: Forecast | None) -> Forecast | None:
        """The least of all ranks' forecasts; None where one has none."""
        told = self.exchange("a forecast", own)
        known = [forecast for forecast in told if forecast is not None]
        if len(known) < len(told):
            return None
        least, most, alone = (min(sizes) for sizes in zip(*((f.least, f.most, f.alone) for f in known), strict=True))
        is_from_afar, is_rough = any(f.is_from_afar for f in known), any(f.is_rough for f in known)
        return Forecast(least, most, alone, is_from_afar=is_from_afar, is_rough=is_rough)

    def setting(self, own: Setting, budget_bytes: int | None) -> Setting:
        """The setting of the rank that has the least memory, with what data all ranks have.

        Args:
            budget_bytes: what this rank's workload can have in all.
        """
        if not self.ranks.are_several:
            return replace(own, budget_bytes=budget_bytes)
        told = self.exchange("the setting", replace(own, budget_bytes=budget_bytes))
        budgets = [each.budget_bytes for each in told]
        self._narrowest = min(range(len(told)), key=lambda rank: (budgets[rank] is None, budgets[rank] or 0))
        if len({each.mode for each in told}) > 1:
            modes = ", ".join(each.mode for each in told)
            raise InvalidArgumentError("mode", own.mode, f"the same on all ranks, which have {modes}")
        least = told[self._narrowest]
        environment = {**least.environment, "ranks": self.ranks.size, "rank_budgets_bytes": budgets}
        return replace(least, data=_common([each.data for each in told]), environment=environment)

    def by_narrowest(self, at: str, function: Callable[[], T]) -> T:
        """What ``function`` gives on the rank that has the least memory, the only one that calls it."""
        mine: Any = function() if self.ranks.rank == self._narrowest else None
        answer: T = self.exchange(at, mine)[self._narrowest]
        return answer

    def clock(self) -> float:
        """Seconds, as rank 0 counts them: ranks would run out of time at different sizes."""
        return self.exchange("the clock", time.monotonic())[0]

    def finish(self, result: BatchSizeResult) -> BatchSizeResult:
        """The result that all ranks have: rank 0's, which differs from theirs in how long it took."""
        if self.ranks.are_several:
            result = replace(result, notes=(*result.notes, f"{self.ranks.size} ranks agree: it fits on each of them."))
        return self.exchange("the answer", result)[0]

    def finish_each(self, result: BatchSizeResult) -> BatchSizeResult:
        """This rank's own result, beside the sizes of the others."""
        if not self.ranks.are_several:
            return result
        sizes = self.exchange("the answers", result.batch_size)
        note = f"Each rank has a size of its own: {', '.join(map(str, sizes))}."
        environment = {**result.environment, "rank": self.ranks.rank, "rank_sizes": sizes}
        return replace(result, environment=environment, notes=(*result.notes, note))

    def _exchanged(self, report: Report) -> list[Report]:
        if not self.ranks.are_several:
            return [report]
        with interrupts_deferred():  # half an exchange would be no exchange
            try:
                reports = self.ranks.gather(report)
            except BaseException:
                self._is_over = True
                raise
        failed = [rank for rank, other in enumerate(reports) if other.error]
        if failed:
            # An error of somebody's own says more than that a size does not fit.
            rank = next((r for r in failed if not isinstance(reports[r].copy, DoesNotFitError)), failed[0])
            self._fail(_error_of(rank, reports[rank]))
        if len({other.at for other in reports}) > 1:
            ways = "; ".join(f"rank {rank}: {other.at}" for rank, other in enumerate(reports))
            self._fail(RankError(f"the ranks went different ways, which is an error of autobatch: {ways}"))
        return reports

    def _fail(self, error: AutobatchError) -> NoReturn:
        """Raises what all ranks know of already."""
        self._is_over = True
        raise error from error.__cause__


def _report_of(exc: BaseException) -> Report:
    if not isinstance(exc, Exception):
        return Report(at="an end", error="it was interrupted" if isinstance(exc, KeyboardInterrupt) else "it was ended")
    copy = portable(exc).exception
    said = f"{type(exc).__name__}: {first_line(exc)}"
    return Report(at="an error", error=said, copy=copy if isinstance(copy, AutobatchError) else None)


def _error_of(rank: int, report: Report) -> AutobatchError:
    """What another rank's error is here."""
    if isinstance(report.copy, DoesNotFitError):
        return DoesNotFitError(f"on rank {rank}, {report.copy.message}", report.copy.trial)
    error = RankError(f"rank {rank} failed: {report.error}", rank)
    error.__cause__ = report.copy
    return error


def _is_well(report: Report) -> bool:
    return not isinstance(report.item, _Tried) or report.item.trial.fits


def _badness(tried: _Tried) -> tuple[bool, bool, float]:
    """Larger is worse. A failure that is surely about memory says more than one that only may be."""
    measured = tried.trial.measurement
    peak_bytes, capacity_bytes = (
        (measured.peak_allocated_bytes or 0, measured.capacity_bytes or 1) if measured else (0, 1)
    )
    return not tried.trial.fits, not tried.suspect, peak_bytes / capacity_bytes


def _slowest(trial: Trial, trials: list[Trial]) -> Trial:
    times_s = [other.measurement.step_time_s for other in trials if other.measurement is not None]
    known_s = [time_s for time_s in times_s if time_s is not None]
    if trial.measurement is None or not known_s:
        return trial
    return replace(trial, measurement=replace(trial.measurement, step_time_s=max(known_s)))


def _common(data: list[Mapping[str, Extent]]) -> dict[str, Extent]:
    """What every rank can draw from; samples of different lengths on one rank make all take shuffled batches."""
    found: dict[str, Extent] = {}
    for mode in {mode for extents in data for mode in extents}:
        extents = [each[mode] for each in data if mode in each]
        found[mode] = Extent(samples=min(e.samples for e in extents), varies=any(e.varies for e in extents))
    return found
