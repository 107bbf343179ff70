"""The largest batch whose allocations, replayed, get through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.replay.allocator import CachingAllocator, OutOfMemory
from autobatch.replay.malloc import Malloc
from autobatch.replay.scaling import Scaling
from autobatch.replay.trace import ALLOCATES, Trace

_NO_END = 2**62  # more bytes than there are
_TOO_FAR = 2**24  # a batch so large is no forecast
_SURE = 0.97  # the least of a forecast is this part of the most, or more: then there is no need to learn first
_MOST_EVENTS = 2_500_000  # what one forecast may replay: some two seconds
_MORE_STEPS = 5  # behind those that were recorded: some sizes run out in a later step


@dataclass(frozen=True, slots=True)
class Forecast:
    """The largest batch that should fit: ``least`` if what is uncertain grows in proportion to it, ``most`` if it grows
    as it has done."""

    least: int
    most: int
    alone: int = 0
    """The largest that should fit as long as nothing smaller comes before it."""
    is_from_afar: bool = False
    """True where it depends on what a process has beside tensors, and that was seen from a much smaller batch."""
    is_rough: bool = False
    """True where the allocator is modelled only approximately, so that what is foretold has to be tried."""

    @property
    def is_sure(self) -> bool:
        """True if what is uncertain matters little."""
        return self.least >= _SURE * self.most


class TooLongError(Exception):
    """A forecast would take longer than trials do."""


def forecast(scaling: Scaling, capacity_bytes: int, *, smallest: int = 1, fitted: int | None = None) -> Forecast | None:
    """Where ``capacity_bytes`` end, for training that begins with such a batch and for training that begins with a
    small one. None where no end is seen.

    Args:
        scaling: of a batch that fitted.
        capacity_bytes: what the allocator may take from the driver.
        smallest: a small batch, as the last of an epoch may be one.
        fitted: for a ``scaling`` of a batch that ran and did not fit, a smaller one that did.

    Raises:
        TooLongError: if there are too many events to replay.
    """
    known, left = scaling.size if fitted is None else fitted, _MOST_EVENTS

    def gets_through(trace: Trace, sizes: Sequence[int]) -> bool:
        nonlocal left
        left -= len(trace.events)
        if left < 0:
            raise TooLongError
        return replay(trace, sizes, capacity_bytes)

    def as_recorded(n: int) -> bool:
        return gets_through(scaling.trace, scaling.sizes(n))

    most = _grown(as_recorded, known) if fitted is None else _shrunk(as_recorded, scaling.size - 1, known)
    if most is None:
        return None
    longer = scaling.prolonged(_MORE_STEPS)
    first = longer.trace.steps[1] if len(longer.trace.steps) > 3 else 0
    small = longer.sizes(smallest)[:first]

    def by_itself(n: int) -> bool:
        return gets_through(longer.trace, longer.sizes(n))

    def behind_small(n: int) -> bool:
        return gets_through(longer.trace, [*small, *longer.sizes(n)[first:]]) and by_itself(n)

    alone = _shrunk(by_itself, most, known)
    most = least = _shrunk(behind_small, alone, known)
    if scaling.uncertain or scaling.squares:
        least = _shrunk(lambda n: gets_through(scaling.trace, scaling.sizes(n, at_worst=True)), most, known)
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
    """Whether the allocator gets through with allocations of ``sizes``, and does not thrash."""
    try:
        retries = _run(trace, sizes, _allocator(trace, capacity_bytes))
    except OutOfMemory:
        return False
    return not thrashes(retries)


def thrashes(retries: Sequence[int]) -> bool:
    """True if the allocator still frees and retries when a run has settled: in both of its last two steps.

    Args:
        retries: how often it had when each step ended.
    """
    return len(retries) > 2 and retries[-3] < retries[-2] < retries[-1]


def peak_reserved_bytes(trace: Trace, sizes: Sequence[int]) -> int:
    """The most that the allocator has from the system at once, with allocations of ``sizes`` and no end of memory."""
    allocator = _allocator(trace, _NO_END)
    _run(trace, sizes, allocator)
    return allocator.peak_reserved_bytes


def _allocator(trace: Trace, capacity_bytes: int) -> CachingAllocator | Malloc:
    if trace.mapped_from_bytes is None:
        return CachingAllocator(capacity_bytes, trace.segments)
    return Malloc(capacity_bytes, trace.mapped_from_bytes)


def _run(trace: Trace, sizes: Sequence[int], allocator: Any) -> list[int]:
    """Gives the events to ``allocator``; how often it had had to free and retry at the end of each step."""
    blocks: list[Any] = []
    ends, retries = iter(trace.steps), list[int]()
    end = next(ends, None)
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
    return [*retries, allocator.retries]
