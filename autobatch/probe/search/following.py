"""To where a replay of the trials says that memory ends: integers in, integers out."""

from __future__ import annotations

from autobatch.probe.search.bracket import Bracket
from autobatch.replay.forecast import Forecast

_SMALL = 2  # so many more small sizes are learnt from at most
_LONGEST_LEAP = 9  # growth to this power
_NEARER = 1 / 4  # the part of a forecast from afar to look from first
_GUESSED = 0.98  # a guess that is this part of a forecast, or more, agrees with it
_OFTEN = 2  # so many times a forecast may be wrong in one direction, and once more: then others than it tell more
_FAR = 1.1  # so many times a size, what is foretold from there is from too far off


def follow(bracket: Bracket, guess: int | None = None, *, trusts: bool = True) -> None:
    """Invariant: ``low`` fits. Asks where memory is foretold to end, then just above, for as long as there are
    forecasts.

    One is made from two sizes, so a search begins with two or three small ones: the kernels that a batch of one sample
    takes are often others than those of more, which the forecast tells by itself. A ``guess`` that lies within an
    unsure forecast, or a little below a sure one, is asked in its place. If ``trusts``, what is foretold well enough is
    not asked itself (:func:`_ends_above`).
    """
    unsure = above = refuted = 0
    is_first = True
    while bracket.is_recorded and not bracket.is_over() and above <= _OFTEN and refuted <= _OFTEN:
        forecast, high = bracket.foretell(), bracket.high
        if forecast is None or (not forecast.is_sure and high is None and unsure < _SMALL and guess is None):
            if high is not None or unsure > _SMALL:
                return
            rank, unsure = _next_to_learn(bracket, forecast, unsure), unsure + 1
        elif guess is not None and _GUESSED * forecast.least <= guess <= forecast.most:
            rank, guess = bracket.rank(guess), None
        elif forecast.is_from_afar and high is None:
            rank = bracket.rank(_NEARER * forecast.least)
        else:
            rank, guess = _foretold(bracket, forecast), None
            if rank <= bracket.low:  # more fits than was foretold, or as much: then the next size fails
                rank, above = bracket.low + 1, above + 1
            elif high is not None and rank >= high:
                rank, refuted = _below(bracket, refuted), refuted + 1
            elif trusts and _is_trusted(bracket, forecast, is_first=is_first):
                if _ends_above(bracket, rank):
                    return
                is_first = False
                continue
            is_first = False
        bracket.leap(rank)


def _foretold(bracket: Bracket, forecast: Forecast) -> int:
    """The rank where memory is foretold to end, or as far on the way as one leap goes."""
    farthest = bracket.size * bracket.growth**_LONGEST_LEAP
    if not forecast.is_sure:
        return bracket.rank(min(forecast.least, farthest))
    bracket.foretold.append(bracket.rank(forecast.most))
    return bracket.rank(min(forecast.most, farthest))


def _is_trusted(bracket: Bracket, forecast: Forecast, *, is_first: bool) -> bool:
    """True where a forecast is as good as a trial: the first one, for nothing says otherwise, or one from near."""
    is_in_reach = forecast.most <= bracket.size * bracket.growth**_LONGEST_LEAP
    is_near = bracket.ran_above or forecast.most <= _FAR * bracket.size
    return forecast.is_sure and not forecast.is_rough and is_in_reach and (is_first or is_near)


def _ends_above(bracket: Bracket, rank: int) -> bool:
    """Asks just above ``rank`` and, if memory ran out there, takes ``rank`` for the candidate; True if so.

    The confirmation is its first run: where the forecast was right, and mostly it is, a trial of it would tell nothing.
    A failure that ran to its end tells more than the forecast did, which is made again with it.
    """
    if bracket.high != rank + 1:
        bracket.leap(rank + 1)
        if bracket.high != rank + 1 or bracket.ran_above:
            return False
    bracket.low = rank
    return True


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
