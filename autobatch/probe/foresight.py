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

    def learn(self, attempt: Attempt) -> None:
        """Takes in a trial that fitted and was recorded; others tell nothing."""
        if attempt.trial.fits and attempt.trace is not None:
            self._traces[attempt.trial.batch_size] = attempt.trace

    def has(self, size: int) -> bool:
        return size in self._traces

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends by the trial of ``size`` and the one next below it that was recorded."""
        smaller = max((other for other in self._traces if other < size), default=None)
        own = None
        if smaller is not None and self._capacity_bytes is not None:
            seen = scaling(self._traces[smaller], smaller, self._traces[size], size)
            own = forecast(seen, self._capacity_bytes, smallest=min(self._traces))
        return self._agree(own)
