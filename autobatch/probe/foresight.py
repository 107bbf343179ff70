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
        self._refused: dict[int, Trace] = {}
        self._foretold: Forecast | None = None

    def learn(self, attempt: Attempt) -> None:
        """Takes in a trial that was recorded and ran to its end."""
        if attempt.trace is not None:
            (self._traces if attempt.trial.fits else self._refused)[attempt.trial.batch_size] = attempt.trace

    def has(self, size: int) -> bool:
        """Whether a trial of ``size`` or a smaller one was recorded."""
        return any(recorded <= size for recorded in self._traces)

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends: by the largest trial of at most ``size`` that was recorded, and the next larger one that
        ran but did not fit, between which it ends; or if there is none, by the next smaller one.
        """
        recorded, own = sorted(other for other in self._traces if other <= size), None
        if recorded and self._capacity_bytes is not None:
            smaller, smallest = recorded[-1], recorded[0]
            refused = min((other for other in self._refused if other > size), default=None)
            if refused is not None:
                seen = scaling(self._traces[smaller], smaller, self._refused[refused], refused)
                own = forecast(seen, self._capacity_bytes, smallest=smallest, fitted=size)
            elif len(recorded) > 1:
                before = recorded[-2]
                seen = scaling(self._traces[before], before, self._traces[smaller], smaller)
                own = forecast(seen, self._capacity_bytes, smallest=smallest)
        self._foretold = self._agree(own)
        return self._foretold

    def expects_failure(self, size: int) -> bool:
        """Whether the last forecast has it that ``size`` does not fit in one history or another."""
        return self._foretold is not None and self._foretold.is_sure and size > self._foretold.most

    def expects_failure_behind_small(self, size: int) -> bool:
        """Whether it fails behind small batches alone."""
        return self._foretold is not None and self.expects_failure(size) and size <= self._foretold.alone
