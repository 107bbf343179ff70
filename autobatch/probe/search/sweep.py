"""From one search to the next along an option: where the next largest batch is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autobatch.result import BatchSizeResult

EXPONENTS = {"seq_len": 1.0, "image_size": 2.0}
"""How a sample grows with the option, before two searches have shown it."""

_LOWEST, _HIGHEST = 0.25, 4.0  # what two searches show is believed in these bounds


def next_guess(option: str, found: Sequence[tuple[int, BatchSizeResult]], value: int) -> int | None:
    """The batch expected at ``value``, from the searches so far, each with its value; None before the first.

    What the model holds is the same at every value, so the largest batches stand in the inverse proportion of the bytes
    that a sample takes. How those grow is seen from the slopes of the last two searches.
    """
    if not found:
        return None
    last_value, last = min(found, key=lambda pair: abs(math.log(pair[0] / value)))
    exponent = EXPONENTS[option]
    others = [pair for pair in found if pair[0] != last_value]
    if others:
        other_value, other = min(others, key=lambda pair: abs(math.log(pair[0] / last_value)))
        growth = _growth(last, other)
        if growth is not None:
            exponent = min(max(math.log(growth) / math.log(last_value / other_value), _LOWEST), _HIGHEST)
    expected: float = last.batch_size * (last_value / value) ** exponent
    return max(1, round(expected))


def sample_bytes(result: BatchSizeResult) -> float | None:
    """Bytes that one more sample takes, from the smallest and the largest size that fitted; None if unknown."""
    peaks = {
        trial.batch_size: trial.measurement.peak_allocated_bytes
        for trial in (*result.trials, *result.confirmation)
        if trial.fits and trial.mode == result.trials[0].mode and trial.measurement is not None
    }
    low, high = min(peaks, default=0), max(peaks, default=0)
    low_bytes, high_bytes = peaks.get(low), peaks.get(high)
    if low == high or not low_bytes or not high_bytes or high_bytes <= low_bytes:
        return None
    return (high_bytes - low_bytes) / (high - low)


def _growth(last: BatchSizeResult, other: BatchSizeResult) -> float | None:
    """How many times the bytes of a sample in ``other`` a sample takes in ``last``."""
    last_bytes, other_bytes = sample_bytes(last), sample_bytes(other)
    if last_bytes and other_bytes:
        return last_bytes / other_bytes
    return other.batch_size / last.batch_size
