"""The largest batch size that fits: integers in, integers out. No torch, no device.

The search keeps a bracket between a size that fits and one that does not (:mod:`autobatch.probe.search.bracket`) and
asks inside it, where the peaks say the memory ends (:mod:`autobatch.probe.search.memory_fit`). A wrong guess costs
trials, never correctness, and whatever an oracle answers, the search ends. Each phase below is headed by its invariant.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from autobatch.probe.search.arguments import check_arguments
from autobatch.probe.search.bracket import LONGEST_JUMP, Ask, Bracket, Foresight
from autobatch.probe.search.creeping import creep
from autobatch.probe.search.following import follow
from autobatch.probe.search.memory_fit import MemoryFit
from autobatch.probe.search.settling import STEP_DOWN, regain, settle

# Tuned on trials recorded on virtual cards (tests/data/oracles_*.json). Each changes what a search costs, none what it
# answers.
_BEYOND_GUESS = 1.2  # an aim so many times the guess was seen from too near
_SPARED = 0.975  # at most so much of the bound is aimed at, for the allocator cannot reuse all that it holds
_NEAR = 1.04  # an aim at most this many times the size is not worth a jump
_SHORT = 0.8  # the part of the way to the aim that one jump goes while the bound is not steady
_BEYOND = 1 / 5  # once the aim is reached, the part of the way to the bound to go at least: less is not worth a trial
_TOWARDS = 0.85  # the part of the way from there to the bound to go next
_SAFELY = 0.99  # the part of a rough bound that is asked at most
_FALL = 1 / 40  # this part of the size below a refuted aim to look next
_SPLIT = 0.43  # where to part a bracket about which nothing is known: below the middle, for a failure costs more
_FAR_OFF = 1.5  # an aim so many brackets away says nothing about where inside to ask
_OPEN = 1 / 10  # a bracket wider than this part of its size is worth another aim, now seen from nearer
_WIDE = 8  # sizes so many times apart are parted in proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchAnswer:
    """The answer: ``batch_size`` was run and confirmed. ``proof`` is one of ``result.PROOFS``."""

    batch_size: int
    proof: str
    smallest_failure: int | None
    """The smallest size above ``batch_size`` that was seen not to fit, in the search or in confirming."""
    notes: tuple[str, ...]
    """Sentences for a person."""


def search(
    ask: Ask,
    confirm: Ask,
    *,
    start: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int | str = "auto",
    growth: float = 2.0,
    capacity_bytes: int | None = None,
    first_guess: int | None = None,
    avoid_oom: bool = False,
    ceiling: int | None = None,
    time_limit_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    foresight: Foresight | None = None,
) -> SearchAnswer:
    """The largest permitted batch size that ``ask`` and ``confirm`` find to fit.

    Args:
        ask: tries one size. Every size is asked at most once; what it raises goes to the caller unchanged.
        confirm: tries a candidate the way training would meet it, mostly again: one that was foretold for the first
            time. One that fails is stepped down.
        start: the size to ask first, rounded to a permitted one and to the cap.
        max_batch_size: a cap; nothing above it is asked.
        multiple_of: which sizes are permitted, see :class:`~autobatch.probe.search.rounding.Rounding`.
        growth: factor from one size to the next while the peaks say nothing; a jump that they support may be longer.
        capacity_bytes: what the workload can have in all. Without it peaks are not used.
        first_guess: a size to ask in place of ``start`` because the answer is expected there; with ``foresight`` the
            first is a small one, from which allocations are told.
        avoid_oom: approach from below and stop where the peaks do not promise that more fits.
        ceiling: with ``avoid_oom``, a size above which nothing is asked, because more is expected to fail.
        time_limit_s: after this many seconds no more is asked once a size is known to fit.
        clock: seconds, for ``time_limit_s``.
        foresight: what the trials tell of sizes that were never run. Where they do, that comes before ``first_guess``.

    Raises:
        DoesNotFitError: not even the smallest permitted size fits.
        InvalidArgumentError: see :func:`~autobatch.probe.search.arguments.check_arguments`.
    """
    rounding = check_arguments(
        start=start,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        growth=growth,
        capacity_bytes=capacity_bytes,
        first_guess=first_guess,
        avoid_oom=avoid_oom,
        ceiling=ceiling,
        time_limit_s=time_limit_s,
    )
    bracket = Bracket(
        ask=ask,
        rounding=rounding,
        growth=growth,
        start=max(1, rounding.rank(start)),
        cap=None if max_batch_size is None else rounding.rank(max_batch_size),
        fit=MemoryFit(capacity_bytes),
        out_of_time=_timer(time_limit_s, clock),
        foresight=foresight,
    )
    _find(bracket, first_guess=first_guess, avoid_oom=avoid_oom, ceiling=ceiling)
    proof = _proof(bracket, avoid_oom=avoid_oom)

    def search_on() -> None:
        nonlocal proof
        _go_on(bracket, None, trusts=False)
        proof = _proof(bracket, avoid_oom=avoid_oom)

    if settle(bracket, confirm, search_on):
        if not avoid_oom:
            regain(bracket, confirm)
        proof = "next_size_failed" if bracket.high == bracket.low + 1 else "stepped_down"
    return SearchAnswer(
        batch_size=bracket.size,
        proof=proof,
        smallest_failure=None if bracket.high is None else rounding.size(bracket.high),
        notes=tuple(bracket.notes),
    )


def _find(bracket: Bracket, *, first_guess: int | None, avoid_oom: bool, ceiling: int | None) -> None:
    """Narrows the bracket until it is closed, or for as long as the caller allows."""
    _begin(bracket, first_guess, is_foretold=bracket.foresight is not None and not avoid_oom)
    if not bracket.low:
        _fall(bracket, near_the_answer=first_guess is not None)
    if avoid_oom:
        creep(bracket, math.inf if ceiling is None else ceiling)
    elif bracket.low:
        _go_on(bracket, first_guess, trusts=True)


def _go_on(bracket: Bracket, first_guess: int | None, *, trusts: bool) -> None:
    """Invariant: ``low`` fits. Follows what is foretold, and then the peaks, until the bracket is closed."""
    follow(bracket, first_guess, trusts=trusts)
    if first_guess is None or bracket.aim is not None:
        _approach(bracket, first_guess)
    _pass_the_aim(bracket, first_guess)
    _close(bracket)


def _begin(bracket: Bracket, first_guess: int | None, *, is_foretold: bool) -> None:
    """Asks where growth starts, or at the guess; where trials are recorded, a small size first, which tells better."""
    if first_guess is None:
        bracket.try_rank(bracket.start)
        return
    guess = bracket.rank(first_guess)
    if is_foretold:
        bracket.try_rank(min(max(bracket.start, 2), max(1, guess)))
        if bracket.is_recorded or not 0 < bracket.low < guess:
            return
    bracket.try_rank(guess)


def _fall(bracket: Bracket, *, near_the_answer: bool) -> None:
    """Invariant: nothing has fitted. Steps down from a guess in widening strides, else asks the smallest size."""
    part = STEP_DOWN
    while near_the_answer and not bracket.low and not bracket.closed and bracket.high is not None and part < 1:
        bracket.try_rank(min(bracket.high - 1, bracket.rank(bracket.rounding.size(bracket.high) * (1 - part))))
        part *= 2
    if not bracket.low and not bracket.closed:
        bracket.try_rank(1)


def _approach(bracket: Bracket, guess: int | None) -> None:
    """Invariant: ``low`` fits. Jumps towards the aim until it is near, for a failure costs more than a trial.

    Without an aim it grows plainly, until something fails.
    """
    while not bracket.is_over():
        size, aim = bracket.size, bracket.aim
        if aim is None:
            if bracket.high is not None:
                return
            bracket.guess(bracket.next_growth())
            continue
        target = _cautious(bracket, aim)
        if guess is not None and size < guess:
            target = min(target, _BEYOND_GUESS * guess)
        if target <= _NEAR * size or bracket.is_above(target):
            return
        bracket.guess(bracket.rank(min(target, size * bracket.growth**LONGEST_JUMP)))


def _cautious(bracket: Bracket, aim: float) -> float:
    """``aim``, or short of it where it is close to the bound, or where the bound has not been seen twice at about
    the same place.

    Where aim and bound are one, the allocator wastes nothing and there is nothing to be cautious about.
    """
    size, bound = bracket.size, bracket.bound
    if bound is None or aim >= bound:
        return aim
    target = min(aim, _SPARED * bound)
    return target if bracket.is_steady else size + _SHORT * (target - size)


def _pass_the_aim(bracket: Bracket, guess: int | None) -> None:
    """Invariant: ``low`` fits and nothing has failed. Asks just beyond the aim, then towards the bound.

    What fits beyond the aim does so because the allocator gave cached memory back, and it can give back more.
    """
    asked = 0
    while bracket.high is None and not bracket.is_over():
        low = bracket.low
        just_beyond = bracket.rank(bracket.aim or bracket.size) + 1 - low
        if bracket.bound is not None:
            step = _towards_the_bound(bracket, bracket.bound, just_beyond, is_first=not asked)
        elif guess is None or (rough := bracket.rough_bound) is None:
            step = max(just_beyond, 2**asked)
        elif asked:
            way, guessed = bracket.rank(_SAFELY * rough) - low, bracket.rank(guess) - low
            step = max(just_beyond, min(guessed, way) if guessed > 0 else round(_TOWARDS * way))
        else:
            step = just_beyond
        asked += 1
        bracket.guess(low + step)


def _towards_the_bound(bracket: Bracket, bound: float, just_beyond: int, *, is_first: bool) -> int:
    """How many ranks to go: not far beyond the aim, and once that fits, most of the way."""
    way = bracket.rank(bound) - bracket.low
    if not is_first:
        return round(_TOWARDS * way)
    if (bracket.aim or bracket.size) >= bound:
        return just_beyond
    return min(max(just_beyond, int(_BEYOND * way)), (way + 1) // 2)


def _close(bracket: Bracket) -> None:
    """Invariant: ``low`` fits and ``high`` does not. Asks at the aim, once unless the bracket is wide; then parts the
    bracket until it is closed.

    An aim that has just been refuted is still the best guess: so look closely below it first, then in widening strides.
    """
    top, stride, aimed = bracket.high, 0, False
    while top is not None and bracket.high is not None and not bracket.is_over():
        low, high = bracket.low, bracket.high
        aim = low if bracket.aim is None else bracket.rank(bracket.aim)
        rank = (low + high) // 2 if bracket.aim is None else low + round(_SPLIT * (high - low))
        if high - low <= 3:
            rank = high - 1 if aim >= high else low + 1  # of two sizes that are left the one that the aim favours
        elif low < aim < high and (not aimed or bracket.rounding.size(high) - bracket.size > _OPEN * bracket.size):
            rank, aimed = aim, True
        elif aim <= low <= (bound := bracket.rank(bracket.bound or 0)) < high - 1:
            rank = bound + 1  # the failure above was a guess from far off
        elif bracket.aim is not None and bracket.rounding.size(high) > _WIDE * bracket.size:
            # The aim was seen from too far off to tell more than that the limit is between.
            rank = bracket.rank(math.sqrt(bracket.size * bracket.rounding.size(high)))
        elif high <= aim <= low + _FAR_OFF * (high - low) and not aimed:
            stride = 2 * stride or max(1, high - bracket.rank(bracket.rounding.size(high) * (1 - _FALL)))
            rank = max(rank, top - stride)
        bracket.guess(rank)


def _proof(bracket: Bracket, *, avoid_oom: bool) -> str:
    if bracket.closed:
        return "max_batch_size" if bracket.high is None else "next_size_failed"
    return "memory_model" if avoid_oom and not bracket.out_of_time() else "time_limit"


def _timer(limit_s: float | None, clock: Callable[[], float]) -> Callable[[], bool]:
    if limit_s is None:
        return lambda: False
    deadline_s = clock() + limit_s
    return lambda: clock() >= deadline_s
