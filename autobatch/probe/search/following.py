"""To where a replay of the trials says that memory ends: integers in, integers out."""

from __future__ import annotations

from autobatch.probe.search.bracket import Bracket
from autobatch.replay.forecast import Forecast
from autobatch.result import Outcome

_SMALL = 2  # so many more small sizes are learnt from at most
_LONGEST_LEAP = 10  # growth to this power
_NEARER = 1 / 4  # the part of a forecast from afar to look from first
_GUESSED = 0.98  # a guess that is this part of a forecast, or more, agrees with it
_OFTEN = 2  # so many times a forecast may be wrong in one direction, and once more: then others than it tell more
_FAR = 1.1  # a forecast more than so many times the size that it was made from is from too far off


def follow(bracket: Bracket, guess: int | None = None, *, trusts: bool = True) -> None:
    """Invariant: ``low`` fits. Asks where memory is foretold to end, then just above, for as long as there are
    forecasts. If ``trusts``, just above at once where the forecast is as good as a trial.

    One is made from two sizes, so a search begins with two or three small ones: the kernels that a batch of one sample
    takes are often others than those of more, which the forecast tells by itself. A ``guess`` that lies within an
    unsure forecast, or a little below a sure one, is asked in its place.
    """
    unsure = above = refuted = 0
    is_first = True
    while bracket.is_recorded and not bracket.is_over() and above <= _OFTEN and refuted <= _OFTEN:
        forecast, high, is_trusted = bracket.foretell(), bracket.high, False
        if forecast is None or (not forecast.is_sure and high is None and unsure < _SMALL and guess is None):
            if high is not None or unsure > _SMALL:
                return
            rank, unsure = _next_to_learn(bracket, forecast, unsure), unsure + 1
        elif guess is not None and _GUESSED * forecast.least <= guess <= forecast.most:
            rank, guess = bracket.rank(guess), None
            is_trusted = trusts and rank > bracket.low and _is_as_good_as_a_trial(bracket, forecast, is_first=is_first)
        elif forecast.is_from_afar and high is None:
            rank = bracket.rank(_NEARER * forecast.least)
        else:
            rank, guess = bracket.rank(_in_reach(bracket, forecast)), None
            if rank <= bracket.low:  # more fits than was foretold, or as much: then the next size fails
                rank, above = bracket.low + 1, above + 1
            elif high is not None and rank >= high:
                rank, refuted = _below(bracket, refuted), refuted + 1
            elif forecast.is_sure and not forecast.is_rough:
                bracket.foretold_ends.append(rank)
                is_trusted = trusts and _is_as_good_as_a_trial(bracket, forecast, is_first=is_first)
            is_first = False
        if not is_trusted:
            bracket.leap(rank)
        elif _fails_above(bracket, rank):
            bracket.trust(rank)
            return


def _in_reach(bracket: Bracket, forecast: Forecast) -> float:
    """Where memory is foretold to end, or as far on the way there as one leap goes."""
    return min(forecast.most if forecast.is_sure else forecast.least, bracket.size * bracket.growth**_LONGEST_LEAP)


def _is_as_good_as_a_trial(bracket: Bracket, forecast: Forecast, *, is_first: bool) -> bool:
    """True for a forecast from near, and for the first one, which nothing has belied yet."""
    is_doubtful = not forecast.is_sure or forecast.is_rough or forecast.most > _in_reach(bracket, forecast)
    if is_doubtful or _met_another_limit(bracket):
        return False
    return is_first or bracket.ran_above or forecast.most <= _FAR * bracket.size


def _fails_above(bracket: Bracket, rank: int) -> bool:
    """Whether memory runs out just above ``rank``, which is asked unless it is known.

    If it does, a trial of ``rank`` would tell nothing where the forecast was right, and mostly it is: the confirmation
    is its first run. A failure that ran to its end may tell more than the forecast did, which is made again with it. If
    that is far off it tells less, for a small size and one that thrashes are too unlike.
    """
    if bracket.high == rank + 1:
        return True
    bracket.leap(rank + 1)
    if bracket.high != rank + 1 or _met_another_limit(bracket):
        return False
    told_more = bracket.foretell() if bracket.ran_above else None
    return told_more is None or not told_more.is_sure or _FAR * told_more.most < bracket.rounding.size(rank)


def _met_another_limit(bracket: Bracket) -> bool:
    """True if what failed above was not memory: a data set may end there, of which no forecast knows."""
    return bracket.failure is not None and bracket.failure.outcome is Outcome.LIMIT


def _next_to_learn(bracket: Bracket, forecast: Forecast | None, unsure: int) -> int:
    """The next size to learn from: twice as large and one more, where there is room for it; then the one beside it,
    for these two mostly take the same kernels.
    """
    size = bracket.size + 1 if unsure == 1 else 2 * bracket.size + 1
    if forecast is not None:
        size = min(size, forecast.least)
    elif bracket.aim is not None:
        size = min(size, int(bracket.aim))
    return max(bracket.low + 1, bracket.rank(size))


def _below(bracket: Bracket, refuted: int) -> int:
    """Where to look below a forecast that was refuted: closely if it came from near, in widening strides; else half
    way, whence the next one is better.
    """
    low, high = bracket.low, bracket.high or bracket.low
    if bracket.rounding.size(high) > _FAR * bracket.size:
        return bracket.rank((bracket.size + bracket.rounding.size(high)) / 2)
    return max(low + 1, high - (1 << refuted))
