"""From the candidate that a search ends with to a size that keeps fitting: integers in, integers out."""

from __future__ import annotations

from collections.abc import Callable

from autobatch.errors import DoesNotFitError
from autobatch.probe.search.bracket import Ask, Bracket
from autobatch.result import Trial

STEP_DOWN = 1 / 33  # a candidate that is not confirmed is stepped down by this part of it
_PATIENCE = 2  # so many such steps, and then each is twice the one before: what is refused still is far too large
_SEVERAL = 5  # more sizes than that given up in stepping down are worth one more confirmation
_LITTLE = 1 / 150  # once half was asked for again, this part of the size is not worth another


def settle(bracket: Bracket, confirm: Ask, search_on: Callable[[], None]) -> bool:
    """Steps down until a size is confirmed; True if it had to.

    A size stepped down to is confirmed without a trial before: the confirmation runs it longer, and in the same process
    first. The first candidate may never have been tried, for it was foretold to fit. If it fails where a trial would
    have, that counts as one: ``search_on`` is called to search below it, and there everything is tried.
    """
    refusals = 0
    while bracket.low:
        trial = confirm(bracket.size)
        if trial.fits:
            return refusals > 0
        if not refusals and bracket.is_refuted_by(trial) and not bracket.out_of_time():
            bracket.distrust(trial)
            search_on()
            continue
        refusals += 1
        _note_refusal(bracket, trial, is_first=refusals == 1)
        bracket.step_down(min(1.0, STEP_DOWN * 2 ** max(0, refusals - _PATIENCE)), refused=trial)
    reason = f": {bracket.failure.message}" if bracket.failure and bracket.failure.message else ""
    raise DoesNotFitError(f"Not even a batch of {bracket.rounding.size(1)} fits{reason}", bracket.failure)


def regain(bracket: Bracket, confirm: Ask) -> None:
    """Invariant: ``low`` is confirmed, and was stepped down to. Halves what that gave up, if it was several sizes or
    more than a single step, until little is left of it.
    """
    if bracket.high is None:
        return
    step = bracket.high - bracket.rank(bracket.rounding.size(bracket.high) * (1 - STEP_DOWN))
    if bracket.high - bracket.low <= min(step, _SEVERAL):
        return
    while not bracket.out_of_time():
        middle, given_up = (bracket.low + bracket.high) // 2, bracket.rounding.size(bracket.high) - bracket.size
        if given_up <= _LITTLE * bracket.size or middle == bracket.low:
            return
        trial = confirm(bracket.rounding.size(middle))
        if trial.fits:
            bracket.low = middle
        else:
            bracket.high, bracket.failure = middle, trial
            _note_refusal(bracket, trial)


def _note_refusal(bracket: Bracket, trial: Trial, *, is_first: bool = False) -> None:
    known = bracket.trials.get(bracket.rounding.rank(trial.batch_size))
    how = f"did not keep fitting{'' if is_first else ' either'}"
    if known is not None:
        how = "fitted once but did not keep fitting"
    reason = f"{trial.outcome.value}: {trial.message}" if trial.message else trial.outcome.value
    bracket.notes.append(f"A batch of {trial.batch_size} {how} ({reason}).")
