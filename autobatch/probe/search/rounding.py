"""Which batch sizes an answer may have."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.errors import InvalidArgumentError

_ALLOWED = "'auto', 'pow2' or a positive whole number"
_FINE = 6  # "auto" keeps this many binary digits after the leading one: 2 ** -6 is the 1.6 % it may give up


@dataclass(frozen=True, slots=True)
class Rounding:
    """The permitted sizes, counted from 1: ``size(1)`` is the smallest, ``size(2)`` the next.

    ``"auto"`` permits multiples of the largest power of two not above n/64: every size below 128, every second one
    below 256, every eighth from 512. So at most 1.6 % is given up, and the last sizes to try are few.
    ``"pow2"`` permits powers of two; a number permits its multiples.
    """

    multiple_of: int | str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.multiple_of, str):
            known = self.multiple_of in ("auto", "pow2")
        else:
            known = (
                isinstance(self.multiple_of, int) and not isinstance(self.multiple_of, bool) and self.multiple_of > 0
            )
        if not known:
            raise InvalidArgumentError("multiple_of", self.multiple_of, _ALLOWED)

    def rank(self, size: int) -> int:
        """How many permitted sizes are not above ``size``."""
        if size < 1:
            return 0
        if isinstance(self.multiple_of, int):
            return size // self.multiple_of
        if self.multiple_of == "pow2":
            return size.bit_length()
        dropped = max(0, size.bit_length() - 1 - _FINE)
        return (size >> dropped) + (dropped << _FINE)

    def size(self, rank: int) -> int:
        """The ``rank``-th permitted size; ``rank`` is at least 1."""
        if isinstance(self.multiple_of, int):
            return rank * self.multiple_of
        if self.multiple_of == "pow2":
            return 1 << (rank - 1)
        dropped = max(0, (rank >> _FINE) - 1)
        return (rank - (dropped << _FINE)) << dropped

    def down(self, size: int) -> int:
        """The largest permitted size not above ``size``; 0 if there is none."""
        rank = self.rank(size)
        return self.size(rank) if rank else 0
