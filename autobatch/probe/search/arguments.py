"""The arguments of a search, checked before anything is asked."""

from __future__ import annotations

import math

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.rounding import Rounding


def check_arguments(
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
) -> Rounding:
    """Checks the arguments of a search without asking anything; returns the rounding they mean.

    Raises:
        InvalidArgumentError: naming the argument, its value and what is allowed.
    """
    rounding = Rounding(multiple_of)
    check_count("start", start)
    optional = {"max_batch_size": max_batch_size, "capacity_bytes": capacity_bytes}
    for name, count in (optional | {"first_guess": first_guess, "ceiling": ceiling}).items():
        if count is not None:
            check_count(name, count)
    if not isinstance(avoid_oom, bool):
        raise InvalidArgumentError("avoid_oom", avoid_oom, "True or False")
    if not _is_number(growth) or not 1 < growth < math.inf:
        raise InvalidArgumentError("growth", growth, "a finite number above 1")
    if time_limit_s is not None and (not _is_number(time_limit_s) or not time_limit_s > 0):
        raise InvalidArgumentError("time_limit_s", time_limit_s, "a positive number of seconds, or None")
    if max_batch_size is not None and not rounding.rank(max_batch_size):
        raise InvalidArgumentError("max_batch_size", max_batch_size, f"at least multiple_of, {multiple_of}")
    return rounding


def within_effective_batch(effective_batch_size: int, *, max_batch_size: int | None, multiple_of: int | str) -> int:
    """``max_batch_size`` for a search of micro-batches: none larger than the whole is of use.

    Raises:
        InvalidArgumentError: naming the argument that is wrong, or the effective batch where no permitted size is as
            small.
    """
    check_count("effective_batch_size", effective_batch_size)
    if max_batch_size is not None:
        check_count("max_batch_size", max_batch_size)
        if max_batch_size < effective_batch_size:
            return max_batch_size
    if not Rounding(multiple_of).rank(effective_batch_size):
        raise InvalidArgumentError("effective_batch_size", effective_batch_size, f"at least multiple_of, {multiple_of}")
    return effective_batch_size


def check_count(argument: str, value: object) -> None:
    """Raises InvalidArgumentError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgumentError(argument, value, "a positive whole number")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
