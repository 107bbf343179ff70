"""The largest batch whose allocations, replayed, get through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autobatch.replay.allocator import Block, CachingAllocator, OutOfMemory
from autobatch.replay.scaling import Scaling
from autobatch.replay.trace import ALLOCATES, Trace

_TOO_FAR = 2**24  # a batch so large is no forecast
_SURE = 0.97
MORE_STEPS = 5  # behind those that were recorded: some sizes run out in a later step


@dataclass(frozen=True, slots=True)
class Forecast:
    """The largest batch that should fit: ``least`` if what is uncertain grows in proportion to it, ``most`` if it grows
    as it has done."""

    least: int
    most: int
    alone: int = 0
    """The largest that should fit as long as nothing smaller comes before it."""

    @property
    def is_sure(self) -> bool:
        """True if what is uncertain matters little."""
        return self.least >= _SURE * self.most


def forecast(scaling: Scaling, capacity_bytes: int, *, smallest: int = 1, fitted: int | None = None) -> Forecast | None:
    """Where ``capacity_bytes`` end, for training that begins with such a batch and for training that begins with a
    small one. None where no end is seen.

    Args:
        scaling: of a batch that fitted.
        capacity_bytes: what the allocator may take from the driver.
        smallest: a small batch, as the last of an epoch may be one.
        fitted: for a ``scaling`` of a batch that ran and did not fit, a smaller one that did.
    """
    known = scaling.size if fitted is None else fitted

    def gets_through(n: int) -> bool:
        return replay(scaling.trace, scaling.sizes(n), capacity_bytes)

    most = _grown(gets_through, known) if fitted is None else _shrunk(gets_through, scaling.size - 1, known)
    if most is None:
        return None
    longer = scaling.prolonged(MORE_STEPS)
    first = longer.trace.steps[1] if len(longer.trace.steps) > 3 else 0
    small = longer.sizes(smallest)[:first]

    def survives(n: int, at_worst: bool, begins_small: bool) -> bool:
        sizes = longer.sizes(n, at_worst=at_worst)
        return replay(longer.trace, [*small, *sizes[first:]] if begins_small else sizes, capacity_bytes)

    def largest(at_most: int, at_worst: bool) -> tuple[int, int]:
        alone = _shrunk(lambda n: survives(n, at_worst, False), at_most, known)
        both = _shrunk(lambda n: survives(n, at_worst, True) and survives(n, at_worst, False), alone, known)
        return both, alone

    most, alone = largest(most, False)
    least = largest(most, True)[0] if scaling.uncertain or scaling.squares else most
    return Forecast(least, most, alone)


def _grown(fits: Callable[[int], bool], known: int) -> int | None:
    """The largest size that fits, found by doubling one that does and bisecting; None if there is no end to it."""
    low, high = known, 2 * known
    while fits(high):
        low, high = high, 2 * high
        if low > _TOO_FAR:
            return None
    return _parted(fits, low, high)


def _shrunk(fits: Callable[[int], bool], wanted: int, known: int) -> int:
    """The largest size up to ``wanted`` that fits, found by widening strides down from there and bisecting; ``known``
    if there is none above it.
    """
    high, stride = wanted + 1, 1
    while (low := max(known, high - stride)) > known and not fits(low):
        high, stride = low, 2 * stride
    return _parted(fits, low, high)


def _parted(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest size that fits between one that is taken to and one that does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def replay(trace: Trace, sizes: Sequence[int], capacity_bytes: int) -> bool:
    """Whether the allocator gets through with allocations of ``sizes``, and does not have to free and retry in both of
    the last two steps, which would be thrashing.
    """
    allocator = CachingAllocator(capacity_bytes, trace.segments)
    blocks: list[Block] = []
    ends, retries = iter(trace.steps), list[int]()
    end = next(ends, None)
    try:
        for event in trace.events:
            if event == ALLOCATES:
                while len(blocks) == end:
                    retries.append(allocator.retries)
                    end = next(ends, None)
                blocks.append(allocator.allocate(sizes[len(blocks)], trace.streams[len(blocks)]))
            elif event >= 0:
                allocator.release(blocks[event])
            else:
                allocator.release(allocator.in_use[ALLOCATES - 1 - event])
    except OutOfMemory:
        return False
    retries.append(allocator.retries)
    return not (len(retries) > 2 and retries[-3] < retries[-2] < retries[-1])
