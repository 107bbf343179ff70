"""Where the peaks that were measured say the memory ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from autobatch.result import Measurement

_APART = 0.75  # peaks closer together than this tell more about the allocator's rounding than about the slope


@dataclass(slots=True)
class MemoryFit:
    """Lines through measured peaks, extended to ``capacity_bytes``.

    Peak *allocated* is a maximum of affine functions of the size, so the line through two of its points never lies
    above it further on: no size beyond :meth:`bound` fits. Peak *reserved* holds what the allocator cannot reuse as
    well; up to :meth:`aim` there is room without giving cached memory back. The limit is between the two.
    Both are guesses: a wrong one costs trials, never correctness.
    """

    capacity_bytes: int | None
    _allocated: dict[int, int] = field(default_factory=dict)
    _reserved: dict[int, int] = field(default_factory=dict)

    def learn(self, size: int, measurement: Measurement | None) -> None:
        """Takes in the peaks of a trial that ran to its end; without both of them, nothing."""
        if measurement and measurement.peak_allocated_bytes and measurement.peak_reserved_bytes:
            # More in tensors than was taken is a count of another kind (the host's resident memory, libraries and all),
            # which no capacity bounds.
            self._allocated[size] = min(measurement.peak_allocated_bytes, measurement.peak_reserved_bytes)
            self._reserved[size] = measurement.peak_reserved_bytes

    def aim(self, size: int) -> float | None:
        """The size at which reserved bytes reach the capacity, seen from ``size``; None if unknown.

        Where the allocator gave memory back in between, the line through two reserved peaks is too flat. Then they grow
        with the allocated ones, in proportion.
        """
        if self.capacity_bytes is None or size not in self._reserved:
            return None
        reserved, allocated = self._reserved[size], self._allocated[size]
        slope = max(_slope(self._reserved, size), _slope(self._allocated, size) * reserved / allocated)
        # Before there is a line, the one through the origin: too steep, and so a guess on the safe side.
        return size + (self.capacity_bytes - reserved) / (slope or reserved / size)

    def bound(self, size: int) -> float | None:
        """The size at which allocated bytes reach the capacity, seen from ``size``; None if unknown."""
        if self.capacity_bytes is None or not (slope := _slope(self._allocated, size)):
            return None
        return size + (self.capacity_bytes - self._allocated[size]) / slope

    def rough_bound(self, size: int) -> float | None:
        """The bound by the line through the origin, where there is no other yet: too low, but little from near it."""
        if self.capacity_bytes is None or size not in self._allocated:
            return None
        return size * self.capacity_bytes / self._allocated[size]


def _slope(peaks: dict[int, int], size: int) -> float:
    """Bytes per sample between the peak at ``size`` and the nearest one well below it; 0 if there is no such line."""
    if size not in peaks:
        return 0.0
    base = max((n for n, peak in peaks.items() if n <= _APART * size and peak < peaks[size]), default=None)
    return 0.0 if base is None else (peaks[size] - peaks[base]) / (size - base)
