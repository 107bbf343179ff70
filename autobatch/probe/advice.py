"""What a result says to do, beside its answer."""

from __future__ import annotations

from autobatch.result import BatchSizeResult
from autobatch.units import format_bytes

FRAGMENTED = 1.05
"""Reserved over allocated bytes above which expandable segments are worth a word."""


def fragmentation_notes(result: BatchSizeResult) -> tuple[str, ...]:
    """Says so if much of what the allocator holds at the answer is in no tensor: expandable segments help there."""
    if result.environment.get("kind") == "cpu":  # malloc's memory, not the caching allocator's
        return ()
    for measured in result.answer_measurements()[:1] if result.smallest_failure is not None else []:
        allocated, reserved = measured.peak_allocated_bytes, measured.peak_reserved_bytes
        if allocated and reserved and reserved > FRAGMENTED * allocated:
            return (
                f"At the answer {format_bytes(reserved)} are reserved for {format_bytes(allocated)} of tensors: "
                "PYTORCH_ALLOC_CONF=expandable_segments:True may let more fit.",
            )
    return ()
