"""What recorded trials tell of batch sizes that were never run."""

from __future__ import annotations

from collections.abc import Callable

from autobatch.probe.trial import Attempt
from autobatch.replay.forecast import Forecast, forecast
from autobatch.replay.scaling import scaling
from autobatch.replay.trace import Trace

RECORDABLE = ("cuda", "rocm")
"""The kinds of device whose allocator keeps a history."""


class Recorded:
    """The recorded trials of one search. Meets :class:`~autobatch.probe.search.bracket.Foresight`.

    Args:
        capacity_bytes: what the trials may have here; None if unknown, and then nothing is foretold.
        agree: what a forecast means where other ranks have theirs.
    """

    def __init__(self, capacity_bytes: int | None, agree: Callable[[Forecast | None], Forecast | None]) -> None:
        self._capacity_bytes, self._agree = capacity_bytes, agree
        self._traces: dict[int, Trace] = {}
        self._foretold: Forecast | None = None

    def learn(self, attempt: Attempt) -> None:
        """Takes in a trial that fitted and was recorded; others tell nothing."""
        if attempt.trial.fits and attempt.trace is not None:
            self._traces[attempt.trial.batch_size] = attempt.trace

    def has(self, size: int) -> bool:
        """Whether a trial of ``size`` or a smaller one was recorded."""
        return any(recorded <= size for recorded in self._traces)

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends, by the two largest trials of at most ``size`` that were recorded."""
        recorded, own = sorted(other for other in self._traces if other <= size), None
        if len(recorded) > 1 and self._capacity_bytes is not None:
            smaller, larger = recorded[-2:]
            seen = scaling(self._traces[smaller], smaller, self._traces[larger], larger)
            own = forecast(seen, self._capacity_bytes, smallest=recorded[0])
        self._foretold = self._agree(own)
        return self._foretold

    def expects_failure(self, size: int) -> bool:
        """Whether the last forecast has it that ``size`` does not fit in one history or another."""
        return self._foretold is not None and self._foretold.is_sure and size > self._foretold.least

    def expects_failure_behind_small(self, size: int) -> bool:
        """Whether it fails behind small batches alone."""
        return self._foretold is not None and self.expects_failure(size) and size <= self._foretold.alone
