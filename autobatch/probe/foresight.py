"""What recorded trials tell of batch sizes that were never run."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from autobatch.errors import AutobatchWarning
from autobatch.probe.trial import Attempt
from autobatch.replay.forecast import Forecast, TooLongError, forecast
from autobatch.replay.scaling import scaling
from autobatch.replay.trace import Trace

RECORDABLE = ("cuda", "rocm")
"""The kinds of device whose allocator keeps a history."""


class Recorded:
    """The recorded trials of one search. Meets :class:`~autobatch.probe.search.bracket.Foresight`.

    Args:
        capacity_bytes: what the trials may have here; None if unknown, and then nothing is foretold.
        steps: how many of each trial count.
        agree: what a forecast means where other ranks have theirs.
    """

    def __init__(
        self, capacity_bytes: int | None, steps: int, agree: Callable[[Forecast | None], Forecast | None]
    ) -> None:
        self._capacity_bytes, self._steps, self._agree = capacity_bytes, steps, agree
        self._fitted, self._gave_up = 0, False
        self._traces: dict[int, Trace] = {}
        self._refused: dict[int, Trace] = {}
        self._foretold: Forecast | None = None

    def learn(self, attempt: Attempt) -> None:
        """Takes in what a trial that ran to its end has recorded, and that it fitted."""
        trial = attempt.trial
        if trial.fits:
            self._fitted = max(self._fitted, trial.batch_size)
        if attempt.trace is not None:
            traces = self._traces if trial.fits else self._refused
            traces[trial.batch_size] = attempt.trace.shortened(self._steps)

    def has(self, size: int) -> bool:
        """Whether a trial of ``size`` or a smaller one was recorded."""
        return any(recorded <= size for recorded in self._traces)

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends: by the largest trial of at most ``size`` that was recorded, and the next larger one that
        ran but did not fit, between which it ends; or if there is none, by the next smaller one.
        """
        own = None
        try:
            own = None if self._gave_up else self._own_forecast(size)
        except TooLongError:
            self._gave_up = True
        except Exception as exc:  # noqa: BLE001 - advice that cannot be had is no error of the caller's or other ranks'
            self._gave_up = True
            said = f"what the trials allocated could not be replayed ({type(exc).__name__}: {exc}); the search goes on"
            warnings.warn(said, AutobatchWarning, stacklevel=2)
        self._foretold = self._agree(own)
        return self._foretold

    def _own_forecast(self, size: int) -> Forecast | None:
        recorded = sorted(other for other in self._traces if other <= size)
        if not recorded or self._capacity_bytes is None:
            return None
        larger, smallest = recorded[-1], recorded[0]
        refused = min((other for other in self._refused if other > size), default=None)
        if refused is not None:
            seen = scaling(self._traces[larger], larger, self._refused[refused], refused)
            return forecast(seen, self._capacity_bytes, smallest=smallest, fitted=size)
        if len(recorded) < 2:
            return None
        seen = scaling(self._traces[recorded[-2]], recorded[-2], self._traces[larger], larger)
        return forecast(seen, self._capacity_bytes, smallest=smallest)

    def expects_failure(self, size: int) -> bool:
        """Whether the last forecast has it that ``size`` does not fit in one history or another, and was not wrong."""
        foretold = self._foretold
        return foretold is not None and foretold.is_sure and size > foretold.most >= self._fitted

    def expects_failure_behind_small(self, size: int) -> bool:
        """Whether it fails behind small batches alone."""
        return self._foretold is not None and self.expects_failure(size) and size <= self._foretold.alone
