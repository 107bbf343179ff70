"""Towards the largest size from below, without a failure: integers in, integers out."""

from __future__ import annotations

from autobatch.probe.search.bracket import Bracket
from autobatch.replay.forecast import Forecast

_PART = 0.7  # of the way to the aim that one step goes from afar
_NEARBY = 1.5  # at most this many times the size, the end is seen from nearby
_PROMISED = 0.96  # the part of an aim seen from nearby that fits
_FORETOLD, _FROM_AFAR = 0.98, 0.8  # the parts of what a replay foretells that fit, seen from nearby and from afar
_LONGEST_STEP = 5  # growth to this power: on a long way the forecast is made again
_GAIN = 100  # a step that gains less than this part of the size is not worth its trial


def creep(bracket: Bracket, ceiling: float) -> None:
    """Invariant: every size asked is one that the peaks promise to fit: up to a little below the aim, once it is near,
    or below what a replay of the trials foretells. What is foretold counts as long as nothing has failed.

    Where the allocator gives cached memory back the aim moves on. How far it can go on no peak tells: so the lowest
    aim that was seen from nearby counts.
    """
    if bracket.aim is None:
        bracket.notes.append("The trials measured no peaks, so nothing says whether a larger batch would fit.")
    aim_ceiling = ceiling
    while bracket.low and not bracket.is_over() and bracket.aim is not None:
        size, aim, forecast = bracket.size, bracket.aim, bracket.foretell()
        if forecast is not None and forecast.is_sure and bracket.high is None:
            farthest = size * bracket.growth**_LONGEST_STEP
            rank = bracket.rank(min(_short_of(forecast, size), ceiling, farthest))
        elif bracket.is_above(aim):
            return
        else:
            if bracket.bound is None:
                target = aim  # seen from one size alone it is on the safe side already
            elif aim > _NEARBY * size:
                target = size + _PART * (aim - size)
            else:
                target = aim_ceiling = min(aim_ceiling, _PROMISED * aim)
            rank = bracket.rank(min(target, aim_ceiling, size * bracket.growth))
        if rank <= bracket.low or bracket.rounding.size(rank) - size < size / _GAIN:
            return
        bracket.try_rank(rank)


def _short_of(forecast: Forecast, size: int) -> int:
    if forecast.least > _NEARBY * size:
        return max(size + 1, int(_FROM_AFAR * forecast.least))
    return round(_FORETOLD * forecast.least)
