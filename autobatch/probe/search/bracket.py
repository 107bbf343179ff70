"""What a search knows: the sizes asked, and the bracket they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.memory_fit import MemoryFit
from autobatch.probe.search.rounding import Rounding
from autobatch.replay.forecast import Forecast
from autobatch.result import Outcome, Trial

Ask = Callable[[int], Trial]

LONGEST_JUMP = 7  # growth to this power; a bound seen from farther away than that tells nothing
_MOST_OF_THE_WAY = 2 / 3
_ABSURD = 2**31  # kernels count samples in 32 bits
_SPARE_TRIALS = 2  # what guesses may cost, at worst, above plain growth and bisection


class Foresight(Protocol):
    """What the trials so far tell of sizes that were never run."""

    def has(self, size: int) -> bool:
        """Whether a trial of ``size`` or a smaller one was recorded."""

    def forecast(self, size: int) -> Forecast | None:
        """Where memory ends, seen from ``size``; None while too little was recorded to tell."""

    def refutes(self, confirming: Trial) -> bool:
        """Whether a run that should have confirmed a size that was never tried failed where a trial would have."""


@dataclass(slots=True, kw_only=True)
class Bracket:
    """The largest rank that fitted, ``low`` (0 for none; once it is a candidate, it need not have been asked), and the
    smallest above it that did not, ``high``.

    Ranks count the permitted sizes (:class:`~autobatch.probe.search.rounding.Rounding`). Only ranks strictly inside are
    asked: so none is asked twice, and every answer shrinks the bracket.
    """

    ask: Ask
    rounding: Rounding
    growth: float
    start: int
    """The rank at which plain growth begins."""
    cap: int | None
    """The largest rank that may be asked."""
    fit: MemoryFit
    out_of_time: Callable[[], bool]
    foresight: Foresight | None = None
    low: int = 0
    high: int | None = None
    doubt: float = 0.0
    """By how many samples aim and bound may be wrong, judged by how far the latest peaks moved the bound."""
    is_steady: bool = False
    """True if the latest peaks left the bound about where it was seen before."""
    trials: dict[int, Trial] = field(default_factory=dict)
    """By rank, in the order asked."""
    failure: Trial | None = None
    """Why ``high`` does not fit."""
    notes: list[str] = field(default_factory=list)
    foretold_ends: list[int] = field(default_factory=list)
    """The ranks where memory was surely foretold to end."""
    _forecasts: dict[tuple[int, int | None], Forecast | None] = field(default_factory=dict)
    """By the ranks between which they were made."""
    _allowance: int | None = None
    """The budget where the first answer was a failure, so that there is no growth to compare with."""

    @property
    def last(self) -> int | None:
        """The largest rank that could still be asked; None if there is no end."""
        return self.cap if self.high is None else self.high - 1

    @property
    def closed(self) -> bool:
        """True when nothing is left to ask above ``low``."""
        return self.last is not None and self.low >= self.last

    def is_over(self) -> bool:
        """True when nothing more is to be asked: closed, or out of time with a size that fits.

        Where ranks search together they agree on the time, so all of them must ask.
        """
        return self.closed or (self.low > 0 and self.out_of_time())

    @property
    def size(self) -> int:
        """The largest size that fitted; 0 if none did."""
        return self.rounding.size(self.low) if self.low else 0

    @property
    def aim(self) -> float | None:
        """The size up to which there is room without giving cached memory back, as far as the peaks tell."""
        return self.fit.aim(self.size)

    @property
    def bound(self) -> float | None:
        """The size beyond which nothing fits, as far as the peaks tell."""
        return self.fit.bound(self.size)

    @property
    def rough_bound(self) -> float | None:
        """The bound as the peak of one size tells it."""
        return self.fit.rough_bound(self.size)

    @property
    def is_recorded(self) -> bool:
        """True if what sizes that fitted have allocated is known."""
        return self.foresight is not None and self.low > 0 and self.foresight.has(self.size)

    def foretell(self) -> Forecast | None:
        """Where memory ends by a replay of what the trials have allocated, seen from the largest that fitted.

        A replay takes up to seconds, and where ranks search together they agree on it, so all of them must ask; what
        was foretold between two ranks of the search is kept.
        """
        if not self.is_recorded or self.foresight is None:
            return None
        seen = (self.low, self.high)  # what ran above and did not fit tells as well
        if seen not in self._forecasts:
            self._forecasts[seen] = self.foresight.forecast(self.size)
        return self._forecasts[seen]

    def rank(self, size: float) -> int:
        """The rank of the largest permitted size not above ``size``."""
        return self.rounding.rank(int(size))

    def is_above(self, size: float) -> bool:
        """True if a failure says that ``size`` does not fit."""
        return self.high is not None and self.rank(size) >= self.high

    def guess(self, rank: int) -> None:
        """As :meth:`try_rank`, at the nearest rank that the budget allows."""
        self.try_rank(self._affordable(max(rank, self.low + 1)))

    def leap(self, rank: int) -> None:
        """As :meth:`guess`, but as far as it likes where plain growth could still go on from here if that fails."""
        grown = self._plain_growth(self.low)[0]
        can_grow_on = self._allowance is None and len(self.trials) + 1 <= grown + _SPARE_TRIALS
        if can_grow_on:
            self.try_rank(rank)
        else:
            self.guess(rank)

    def try_rank(self, rank: int) -> None:
        """Asks the size at ``rank``, or at the nearest rank inside the bracket, and learns from the answer."""
        rank = max(rank, self.low + 1)
        if self.last is not None:
            rank = min(rank, self.last)
        size, bound = self.size, self.bound
        self._check_growing()
        trial = self.trials[rank] = self.ask(self.rounding.size(rank))
        self.fit.learn(trial.batch_size, trial.measurement)
        if trial.fits:
            if not self.low and self.high is not None:
                self._allowance = len(self.trials) + _bisections(rank, self.high) + _SPARE_TRIALS
            self.low = rank
            self._judge_bound(size, bound)
        else:
            self._fail(rank, trial)

    def _fail(self, rank: int, trial: Trial) -> None:
        self.high, self.failure = rank, trial
        if trial.outcome is Outcome.LIMIT:
            reason = trial.message or "unknown"
            self.notes.append(f"A batch of {trial.batch_size} met a limit other than memory: {reason}.")

    def _check_growing(self) -> None:
        """Raises InvalidArgumentError where nothing ends the search, since memory does not grow with the size."""
        if self.last is None and self.size >= _ABSURD:
            allowed = f"given here, where a batch of {self.size} still fits: is what is trained made of n samples?"
            raise InvalidArgumentError("max_batch_size", None, allowed)

    def _judge_bound(self, size: int, former: float | None) -> None:
        """Learns from how far the bound moved since it was seen from ``size``; nearer to it, less doubt is left."""
        bound = self.bound
        if bound is not None and former is not None and size < former <= self.size * self.growth**LONGEST_JUMP:
            left = max(0.0, bound - self.size) / (former - size)
            self.doubt = max(abs(bound - former), self.doubt) * left
            self.is_steady = 2 * self.doubt < bound - self.size

    @property
    def ran_above(self) -> bool:
        """True if the smallest failure ran, so that it may tell something."""
        return self.failure is not None and self.failure.outcome in (Outcome.THRASHED, Outcome.OVER_HEADROOM)

    def trust(self, rank: int) -> None:
        """Takes ``rank``, just below ``high``, for the candidate although it was not asked."""
        self.low = rank

    def is_refuted_by(self, refused: Trial) -> bool:
        """True if ``refused``, a run that should have confirmed ``low``, is the first of it and stands for a trial."""
        is_untried = self.low not in self.trials
        return is_untried and self.foresight is not None and self.foresight.refutes(refused)

    def distrust(self, refused: Trial) -> None:
        """Puts ``low``, which was never asked, above the bracket, as if it had been; the largest that fitted is ``low``
        again.
        """
        self._fail(self.low, refused)
        self.low = max((rank for rank, trial in self.trials.items() if trial.fits and rank < self.low), default=0)

    def step_down(self, part: float, *, refused: Trial) -> None:
        """Puts ``low``, which ``refused`` found not to keep fitting, above the bracket, and ``part`` of it below, or
        to a forecast, if one lies between.

        A size known to fit is enough if it is most of that way down; above, it counts no more, for it is likely to be
        refused too.
        """
        self.high, self.failure = self.low, refused
        below = min(self.high - 1, max(1, self.rank(self.rounding.size(self.high) * (1 - part))))
        enough = max(
            below, min(self.high - 2, self.rank(self.rounding.size(self.high) * (1 - _MOST_OF_THE_WAY * part)))
        )
        known = (rank for rank, trial in self.trials.items() if trial.fits and below <= rank <= enough)
        foretold = (rank for rank in self.foretold_ends if below <= rank < self.high)
        self.low = max((*known, *foretold), default=below)
        self.foretold_ends.clear()  # one of them may have been right; to try each in turn would be dear

    def next_growth(self) -> int:
        """The rank that plain growth asks after ``low``."""
        return self._plain_growth(self.low)[2]

    def _affordable(self, rank: int) -> int:
        """``rank``, or the nearest that keeps the search within what plain growth and bisection use, plus a few.

        If it fails, bisecting what is below must be within the budget; if it fits, what is above must be.
        """
        used = len(self.trials) + 1
        rank = min(rank, self.low + (1 << max(0, self._budget(self.low) - used)))
        if self.high is not None:
            if used + _bisections(rank, self.high) <= self._budget(rank):
                return rank
            grown, _, following = self._plain_growth(self.low)
            # A failure above may have been a leap: below it plain growth can go on.
            can_grow_on = self._allowance is None and len(self.trials) <= grown + _SPARE_TRIALS
            return following if can_grow_on and following < self.high else (self.low + self.high) // 2
        return rank if used <= self._plain_growth(rank)[0] + _SPARE_TRIALS else self.next_growth()

    def _budget(self, low: int) -> int:
        """The trials that plain growth and bisection need where ``low`` is the limit, plus a few."""
        if self._allowance is not None:
            return self._allowance
        grown, below, above = self._plain_growth(low)
        return grown + 1 + _bisections(below, above) + _SPARE_TRIALS

    def _plain_growth(self, low: int) -> tuple[int, int, int]:
        """How many ranks plain growth asks up to ``low``, the last of them, and the one after."""
        count, below, above = 0, 0, self.start
        while above <= low:
            count, below = count + 1, above
            above = max(above + 1, self.rank(self.rounding.size(above) * self.growth))
        return count, below, above


def _bisections(low: int, high: int) -> int:
    """Trials that bisection needs to close a bracket of ranks."""
    return max(0, high - low - 1).bit_length()
