"""The share of a device that torch's caching allocators let a process reserve, in bytes and exactly put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def fraction_of(limit_bytes: int, total_bytes: int) -> float:
    """The fraction from which an allocator computes ``limit_bytes`` again: it takes ``int(fraction * total)``."""
    limit_bytes = min(limit_bytes, total_bytes)
    fraction = limit_bytes / total_bytes
    # The quotient may have been rounded down, and then the product loses a byte.
    return math.nextafter(fraction, 1.0) if int(fraction * total_bytes) < limit_bytes else fraction


@contextmanager
def reserve_at_most(
    limit_bytes: int, total_bytes: int, *, before: float, set_fraction: Callable[[float], None]
) -> Iterator[None]:
    """Inside, the allocator reserves ``limit_bytes`` at most; on leaving it has the fraction ``before`` again."""
    set_fraction(fraction_of(limit_bytes, total_bytes))
    try:
        yield
    finally:
        # What an allocator reports is bytes over total, and may lose a byte on its way back.
        set_fraction(fraction_of(round(before * total_bytes), total_bytes) if before <= 1 else before)
