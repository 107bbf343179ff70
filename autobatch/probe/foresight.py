"""What recorded trials tell of batch sizes that were never run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from autobatch.errors import AutobatchWarning
from autobatch.probe.trial import Attempt
from autobatch.replay.forecast import Forecast, TooLongError, forecast, peak_reserved_bytes
from autobatch.replay.scaling import Scaling, scaling
from autobatch.replay.trace import Trace
from autobatch.result import AFTER_SEARCH, FRESH, Trial

RECORDABLE = ("cuda", "rocm", "cpu")
"""The kinds of device of whose allocations there is a history."""


_AFAR = 8  # so many times a size, what a process has beside tensors may be more than it was there


class Recorded:
    """The recorded trials of one search. Meets :class:`~autobatch.probe.search.bracket.Foresight`.

    The search asks for a :meth:`forecast` before it asks for a size; the other methods speak of the last one.

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
        self._peaks_bytes: dict[int, int] = {}
        self._foretold: Forecast | None = None

    def learn(self, attempt: Attempt) -> None:
        """Takes in what a trial that ran to its end has recorded, and that it fitted."""
        trial = attempt.trial
        if trial.fits:
            self._fitted = max(self._fitted, trial.batch_size)
            measured = trial.measurement
            if measured is not None and (peak_bytes := measured.peak_reserved_bytes or measured.peak_allocated_bytes):
                self._peaks_bytes[trial.batch_size] = peak_bytes
        if attempt.trace is not None:
            traces = self._traces if trial.fits else self._refused
            traces[trial.batch_size] = attempt.trace.shortened(self._steps)

    def wants(self) -> bool:
        """Whether another trial should be recorded. On the host, where recording takes some of the memory that is
        tried, only until a forecast is sure."""
        return not self._is_of_host or self._foretold is None or not self._foretold.is_sure

    def has(self, size: int) -> bool:
        """Whether a trial of ``size`` or a smaller one was recorded."""
        return any(recorded <= size for recorded in self._traces)

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends; all ranks that search together must ask.

        The largest trial of at most ``size`` that was recorded tells it, with the next larger one that ran but did not
        fit, between which it ends; or if there is none, with the next smaller one.
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
            foretold = forecast(seen, self._capacity_bytes - self._beside_bytes(seen), smallest=smallest, fitted=size)
        elif len(recorded) < 2:
            return None
        else:
            seen = scaling(self._traces[recorded[-2]], recorded[-2], self._traces[larger], larger)
            foretold = forecast(seen, self._capacity_bytes - self._beside_bytes(seen), smallest=smallest)
        if foretold is None or not self._is_of_host:
            return foretold
        is_from_afar = refused is None and _AFAR * self._fitted < foretold.least
        return replace(foretold, is_from_afar=is_from_afar, is_rough=True)

    def _beside_bytes(self, seen: Scaling) -> int:
        """What a process of the host takes beside torch's tensors, as the largest trial that fitted shows it. A GPU's
        allocator, as it is modelled, has nothing beside them."""
        largest = max(self._peaks_bytes, default=None)
        if largest is None or not self._is_of_host:
            return 0
        return max(0, self._peaks_bytes[largest] - peak_reserved_bytes(seen.trace, seen.sizes(largest)))

    @property
    def _is_of_host(self) -> bool:
        return any(trace.mapped_from_bytes is not None for trace in self._traces.values())

    def expects_failure(self, size: int) -> bool:
        """Whether the last forecast has it that ``size`` does not fit in one history or another, and was not wrong."""
        foretold = self._foretold
        return foretold is not None and foretold.is_sure and size > foretold.most >= self._fitted

    def is_at_the_end(self, size: int) -> bool:
        """Whether ``size`` is the largest that is foretold to fit, or nearly so, in a process that begins with it: what
        was done before decides then. Where small batches before it are what decides, a process has to have run them.
        """
        foretold = self._foretold
        if foretold is None or not foretold.is_sure or foretold.alone > foretold.most:
            return False
        return foretold.least <= size <= foretold.most

    def refutes(self, confirming: Trial) -> bool:
        """Whether a confirming run of a size that was never tried failed where a trial would have: by itself, in one of
        the first steps."""
        return confirming.history in (FRESH, AFTER_SEARCH) and confirming.steps < self._steps

    def belongs_behind_small(self, size: int) -> bool:
        """Whether a trial of it is to run small batches first: where it is foretold to fail behind them alone, and on
        the host once nothing more is recorded, for there what fails mostly does so behind others."""
        if self._is_of_host:
            return not self.wants()
        return self._foretold is not None and self.expects_failure(size) and size <= self._foretold.alone
