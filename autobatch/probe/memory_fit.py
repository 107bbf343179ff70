"""Where the peaks that were measured say the memory ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from autobatch.result import Measurement


@dataclass(slots=True)
class MemoryFit:
    """Two lines through measured peaks, extended to ``capacity_bytes``.

    Peak *allocated* is a maximum of affine functions of the size, so the line through two of its points never lies
    above it further on: no size beyond :meth:`bound` fits. Peak *reserved* holds what the allocator cannot reuse as
    well; up to :meth:`aim` there is room without giving cached memory back. The limit is between the two.
    Both are guesses: a wrong one costs trials, never correctness.
    """

    capacity_bytes: int | None
    _allocated: dict[int, int] = field(default_factory=dict)
    _reserved: dict[int, int] = field(default_factory=dict)

    def learn(self, size: int, measurement: Measurement | None) -> None:
        """Takes in the peaks of a trial that ran to its end."""
        if measurement is None:
            return
        for peaks, peak in (
            (self._allocated, measurement.peak_allocated_bytes),
            (self._reserved, measurement.peak_reserved_bytes),
        ):
            if peak:
                peaks[size] = peak

    def aim(self, size: int) -> float | None:
        """The size at which reserved bytes reach the capacity, seen from ``size``; None if unknown."""
        return _reach(self._reserved, size, self.capacity_bytes)

    def bound(self, size: int) -> float | None:
        """The size at which allocated bytes reach the capacity, seen from ``size``; None if unknown."""
        return _reach(self._allocated, size, self.capacity_bytes)


def _reach(peaks: dict[int, int], size: int, capacity_bytes: int | None) -> float | None:
    """Where the line through the peak at ``size`` and one well below it meets the capacity.

    Peaks that lie close together say more about the allocator's rounding than about the slope; before there are two,
    the other is the origin, which puts the meeting point too low rather than too high.
    """
    if capacity_bytes is None or size not in peaks:
        return None
    base = max((n for n in peaks if n <= 0.75 * size and peaks[n] < peaks[size]), default=0)
    slope = (peaks[size] - peaks.get(base, 0)) / (size - base)
    return size + (capacity_bytes - peaks[size]) / slope
