"""A model of glibc's malloc with a fixed threshold: what is large is mapped by itself, what is small shares a heap.

From malloc/malloc.c (glibc 2.36): a mapping is gone when it is freed; the heap, of which only the top goes back, is
taken to keep the most that ever lived in it. What a process has beside torch's tensors is not modelled: the peaks of
trials tell it (:class:`~autobatch.probe.foresight.Recorded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autobatch.replay.allocator import OutOfMemory
from autobatch.units import KIB

_PAGE = 4 * KIB
_HEADER = 64 + 16
"""Torch aligns to 64 bytes (c10/core/alignment.h), and malloc writes two words before what it gives out."""


class Chunk(NamedTuple):
    size: int
    is_mapped: bool


class Malloc:
    """Takes private data from a system that has ``capacity_bytes``. Used as
    :class:`~autobatch.replay.allocator.CachingAllocator` is.

    Args:
        capacity_bytes: what heap and mappings may have together.
        mapped_from_bytes: an allocation of so many is mapped.
    """

    retries = 0
    in_use: Sequence[Chunk] = ()
    """Of what there was at the beginning nothing is known."""

    def __init__(self, capacity_bytes: int, mapped_from_bytes: int) -> None:
        self.capacity_bytes, self._mapped_from_bytes = capacity_bytes, mapped_from_bytes
        self.peak_reserved_bytes = 0
        self._mapped_bytes = self._lives_bytes = self._heap_bytes = 0

    def allocate(self, size: int, stream: int) -> Chunk:
        """A chunk of at least ``size`` bytes.

        Raises:
            OutOfMemory: if there is no room for it.
        """
        size += _HEADER
        is_mapped = size >= self._mapped_from_bytes
        if is_mapped:
            size = -(-size // _PAGE) * _PAGE
            self._mapped_bytes += size
        else:
            self._lives_bytes += size
            self._heap_bytes = max(self._heap_bytes, self._lives_bytes)
        reserved_bytes = self._mapped_bytes + self._heap_bytes
        if reserved_bytes > self.capacity_bytes:
            raise OutOfMemory(size)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved_bytes)
        return Chunk(size, is_mapped)

    def release(self, chunk: Chunk) -> None:
        if chunk.is_mapped:
            self._mapped_bytes -= chunk.size
        else:
            self._lives_bytes -= chunk.size
