"""What a run allocates, recorded by torch itself: its allocator keeps a history for whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autobatch.replay.trace import Trace, trace_of

_MOST_ENTRIES = 600_000  # longer runs are not recorded: replaying one would take longer than running it
_DEFAULTS = {"expandable_segments": False, "garbage_collection_threshold": 0.0, "max_split_size": -1}


class CudaRecording:
    """The history of one GPU's caching allocator, from the making of this object."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._before: list[dict[str, Any]] = self._segments()
        self._allocations_before = self._allocations()
        self._steps: list[int] = []

    def step_ended(self) -> None:
        self._steps.append(self._allocations() - self._allocations_before)

    def trace(self) -> Trace | None:
        """What happened so far; None where the model of the allocator does not know how it would go on."""
        snapshot = torch.cuda.memory._snapshot()
        entries = snapshot["device_traces"][self._index]
        if len(entries) >= _MOST_ENTRIES or not _is_plain(snapshot["allocator_settings"]):
            return None
        if any(segment["segment_pool_id"] != (0, 0) for segment in (*self._before, *self._segments())):
            return None  # a CUDA graph's own memory
        return trace_of(self._before, entries, self._steps)

    def _segments(self) -> list[dict[str, Any]]:
        return [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == self._index]

    def _allocations(self) -> int:
        count: int = torch.cuda.memory_stats(self._index)["allocation.all.allocated"]
        return count


@contextmanager
def recording(index: int) -> Iterator[CudaRecording | None]:
    """Records inside what the GPU's allocator does; None where somebody else does so, or torch has no such history."""
    if not _is_free():
        yield None
        return
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=_MOST_ENTRIES)
    try:
        yield CudaRecording(index)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _is_free() -> bool:
    is_enabled = getattr(torch._C, "_cuda_isHistoryEnabled", None)
    return is_enabled is not None and not is_enabled() and torch.cuda.get_allocator_backend() == "native"


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether the allocator has its default settings, as far as they decide which block is given out."""
    changed = any(settings.get(name, default) != default for name, default in _DEFAULTS.items())
    return not changed and not any(settings.get("roundup_power2_divisions", {}).values())
