"""A model of PyTorch's caching allocator: which segments it takes from the driver, and when it runs out.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.14) with its settings left alone: no expandable
segments, no largest size to split, no rounding to powers of two. Given what torch's own was asked for, its peak of
reserved bytes is the same, to the byte (tests/gpu/test_replay.py). torch 2.11 takes the lowest of free blocks of one
size, where 2.14 takes the oldest segment's: beside it the peak can be a small segment off.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from autobatch.replay.trace import Segment
from autobatch.units import MIB

_ROUNDED_TO = 512  # kMinBlockSize
_SMALL = MIB  # kSmallSize: up to this, an allocation comes out of small segments
_SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
_MIDDLE = 10 * MIB  # kMinLargeAlloc: below this, out of segments of
_MIDDLE_SEGMENT = 20 * MIB  # kLargeBuffer
_LARGE_ROUNDED_TO = 2 * MIB  # kRoundLarge
_BEGINNING = 1 << 47  # an address; only their order counts


class OutOfMemory(Exception):
    """An allocation that even an empty cache has no room for."""


class Block:
    """Part of a segment, in use or free; its neighbours are of the same segment."""

    __slots__ = ("address", "after", "before", "free", "is_free", "size")

    def __init__(
        self, address: int, size: int, free: list[tuple[int, int, Block]], before: Block | None, after: Block | None
    ) -> None:
        self.address, self.size, self.before, self.after = address, size, before, after
        self.free = free
        """The free blocks of its kind and stream, by size and then by address."""
        self.is_free = False


class CachingAllocator:
    """Takes segments from a driver that has ``capacity_bytes``, beginning with those that are there.

    Args:
        capacity_bytes: what all segments may have together.
        segments: what there is at the beginning.
    """

    def __init__(self, capacity_bytes: int, segments: Sequence[Segment] = ()) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        """How often the whole cache was given back before there was room."""
        self.in_use: list[Block] = []
        """The blocks in use at the beginning, in the order of ``segments``."""
        self._free: dict[tuple[bool, int], list[tuple[int, int, Block]]] = {}
        self._end = _BEGINNING  # above all that a driver gives out
        for segment in segments:
            self._put(segment)

    def allocate(self, size: int, stream: int) -> Block:
        """A block of at least ``size`` bytes.

        Raises:
            OutOfMemory: if there is none, and none can be had.
        """
        size = max(_ROUNDED_TO, -(-size // _ROUNDED_TO) * _ROUNDED_TO)
        is_small = size <= _SMALL
        free = self._free.setdefault((is_small, stream), [])
        best = bisect_left(free, (size, 0))
        block = free.pop(best)[2] if best < len(free) else self._take(size, free)
        block.is_free = False
        if block.size - size >= (_ROUNDED_TO if is_small else _SMALL + 1):
            self._split(block, size)
        return block

    def release(self, block: Block) -> None:
        """Puts ``block`` among the free ones, as one with those beside it.

        Raises:
            ValueError: if it is free already.
        """
        if block.is_free:
            raise ValueError("a block is released twice")
        after, before = block.after, block.before
        if after is not None and after.is_free:
            _forget(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        if before is not None and before.is_free:
            _forget(before)
            before.size += block.size
            before.after = block.after
            if block.after is not None:
                block.after.before = before
            block = before
        block.is_free = True
        insort(block.free, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Gives the driver every segment of which nothing is in use."""
        for free in self._free.values():
            kept = []
            for entry in free:
                block = entry[2]
                if block.before is None and block.after is None:
                    self.reserved_bytes -= block.size
                else:
                    kept.append(entry)
            free[:] = kept

    def _put(self, segment: Segment) -> None:
        free = self._free.setdefault((segment.is_small, segment.stream), [])
        before, address = None, segment.address
        for size, is_used in segment.blocks:
            block = Block(address, size, free, before, None)
            if before is not None:
                before.after = block
            before = block
            address += size
            if is_used:
                self.in_use.append(block)
            else:
                block.is_free = True
                insort(free, (size, block.address, block))
            self.reserved_bytes += size
        self.peak_reserved_bytes = self.reserved_bytes

    def _take(self, size: int, free: list[tuple[int, int, Block]]) -> Block:
        """A new segment that holds ``size`` bytes."""
        if size <= _SMALL:
            segment_bytes = _SMALL_SEGMENT
        elif size < _MIDDLE:
            segment_bytes = _MIDDLE_SEGMENT
        else:
            segment_bytes = -(-size // _LARGE_ROUNDED_TO) * _LARGE_ROUNDED_TO
        if self.reserved_bytes + segment_bytes > self.capacity_bytes:
            self.empty_cache()
            if self.reserved_bytes + segment_bytes > self.capacity_bytes:
                raise OutOfMemory(size)
            self.retries += 1
        self.reserved_bytes += segment_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(self._end, segment_bytes, free, None, None)
        self._end += segment_bytes
        return block

    def _split(self, block: Block, size: int) -> None:
        """Keeps the first ``size`` bytes of ``block`` and frees the rest."""
        rest = Block(block.address + size, block.size - size, block.free, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after, rest.is_free = size, rest, True
        insort(rest.free, (rest.size, rest.address, rest))


def _forget(block: Block) -> None:
    del block.free[bisect_left(block.free, (block.size, block.address))]
