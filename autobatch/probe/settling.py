"""From the candidate that a search ends with to a size that keeps fitting: integers in, integers out."""

from __future__ import annotations

from autobatch.errors import DoesNotFitError
from autobatch.probe.bracket import Ask, Bracket
from autobatch.result import Trial

STEP_DOWN = 1 / 33  # a candidate that is not confirmed is stepped down by this part of it
_SEVERAL = 8  # so many sizes given up in stepping down are worth one more confirmation
_LITTLE = 1 / 66  # once half was asked for again, this part of the size is not worth another


def settle(bracket: Bracket, confirm: Ask) -> bool:
    """Steps down until a size is confirmed; True if it had to.

    A size stepped down to is confirmed without a trial before: the confirmation runs it longer, and in the same process
    first.
    """
    stepped = False
    while bracket.low:
        trial = confirm(bracket.size)
        if trial.fits:
            return stepped
        stepped = True
        _note_refusal(bracket, trial)
        bracket.step_down(STEP_DOWN, refused=trial)
    reason = f": {bracket.failure.message}" if bracket.failure and bracket.failure.message else ""
    raise DoesNotFitError(f"Not even a batch of {bracket.rounding.size(1)} fits{reason}", bracket.failure)


def regain(bracket: Bracket, confirm: Ask) -> None:
    """Invariant: ``low`` is confirmed, and was stepped down to. Halves what that gave up, if it was several sizes,
    until little is left of it.
    """
    several = bracket.high is not None and bracket.high - bracket.low > _SEVERAL
    while several and bracket.high is not None and not bracket.out_of_time():
        middle, given_up = (bracket.low + bracket.high) // 2, bracket.rounding.size(bracket.high) - bracket.size
        if given_up <= _LITTLE * bracket.size or middle == bracket.low:
            return
        trial = confirm(bracket.rounding.size(middle))
        if trial.fits:
            bracket.low = middle
        else:
            bracket.high, bracket.failure = middle, trial
            _note_refusal(bracket, trial)


def _note_refusal(bracket: Bracket, trial: Trial) -> None:
    known = bracket.trials.get(bracket.rounding.rank(trial.batch_size))
    how = "fitted once but did not keep fitting" if known is not None else "did not keep fitting either"
    reason = f"{trial.outcome.value}: {trial.message}" if trial.message else trial.outcome.value
    bracket.notes.append(f"A batch of {trial.batch_size} {how} ({reason}).")
