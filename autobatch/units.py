"""Bytes and seconds: how they are written by people and how they are printed.

Inside autobatch every size is an ``int`` of bytes and every time a ``float`` of seconds.
"""

from __future__ import annotations

import re

from autobatch.errors import InvalidArgumentError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_FACTORS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_FACTORS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_ALLOWED = "a positive number of bytes, such as 8589934592, '8GiB' or '512MiB' (GB and MB are powers of ten)"


def parse_bytes(value: int | float | str, *, argument: str = "bytes") -> int:
    """The number of bytes in ``value``: an int, or text such as ``"10GiB"``, ``"512 MiB"`` or ``"24GB"``.

    Raises:
        InvalidArgumentError: naming ``argument`` if the value is not a positive size.
    """
    if isinstance(value, bool):
        raise InvalidArgumentError(argument, value, _ALLOWED)
    if isinstance(value, (int, float)):
        number, factor = float(value), 1
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2].lower() not in _FACTORS:
            raise InvalidArgumentError(argument, value, _ALLOWED)
        number, factor = float(match[1]), _FACTORS[match[2].lower()]
    size = number * factor
    # A part of a byte is not a size: who writes 1.5 has forgotten the unit.
    if not 1 <= size < float("inf") or (factor == 1 and not size.is_integer()):
        raise InvalidArgumentError(argument, value, _ALLOWED)
    return int(size)


def format_bytes(size_bytes: int | None) -> str:
    """``size_bytes`` for a person, in binary units; ``None`` is "unknown", which is not zero."""
    if size_bytes is None:
        return "unknown"
    for unit, factor, digits in (("TiB", TIB, 2), ("GiB", GIB, 2), ("MiB", MIB, 0), ("KiB", KIB, 0)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.{digits}f} {unit}"
    return f"{size_bytes} B"


def format_seconds(duration_s: float | None) -> str:
    """``duration_s`` for a person; ``None`` is "unknown"."""
    if duration_s is None:
        return "unknown"
    if duration_s < 1:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes} min {seconds} s"
