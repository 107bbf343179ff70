"""What torch's caching allocator is asked for, recorded by torch itself, which keeps a history for whoever wants it.

No public function gives it: where another torch has it otherwise, nothing is recorded. Uses the standard library alone,
and the torch that it is given, for the start-up hook loads it by its file.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_ENTRIES = 600_000  # longer runs are not recorded: replaying one would take longer than running it
_TELLING, _TOLD = ("alloc", "free_completed"), ("action", "addr", "size", "stream")
_DEFAULTS = {"expandable_segments": False, "garbage_collection_threshold": 0.0, "max_split_size": -1}


class History:
    """The history of one GPU's allocator, from :func:`begin` to :meth:`end`."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch, self.index = torch, index
        self._before = self._segments()
        self._allocations_before = self._allocations()
        self._steps: list[int] = []

    def step_ended(self) -> None:
        """Called after each step."""
        self._steps.append(self._allocations() - self._allocations_before)

    def told(self) -> dict[str, Any] | None:
        """The segments there were before, what happened since and the allocations up to the end of each step, as
        :func:`autobatch.replay.trace.trace_of` takes them. None where another allocator's rules would be in force.
        """
        try:
            snapshot = self._torch.cuda.memory._snapshot()
            entries = snapshot["device_traces"][self.index]
            if len(entries) >= _MOST_ENTRIES or not _is_plain(snapshot["allocator_settings"]):
                return None
            if any(segment["segment_pool_id"] != (0, 0) for segment in (*self._before, *self._segments())):
                return None  # a CUDA graph's own memory
            told = [[entry[name] for name in _TOLD] for entry in entries if entry["action"] in _TELLING]
            return {"before": self._before, "entries": told, "steps": self._steps}
        except (AttributeError, LookupError, TypeError):
            return None

    def end(self) -> None:
        """Records no more, and forgets what was."""
        self._torch.cuda.memory._record_memory_history(enabled=None)

    def _segments(self) -> list[dict[str, Any]]:
        return [segment for segment in self._torch.cuda.memory_snapshot() if segment["device"] == self.index]

    def _allocations(self) -> int:
        return int(self._torch.cuda.memory_stats(self.index)["allocation.all.allocated"])


def begin(torch: Any, index: int) -> History | None:
    """Begins to record; None where somebody else does so, or torch has no such history."""
    is_enabled = getattr(torch._C, "_cuda_isHistoryEnabled", None)
    if is_enabled is None or is_enabled() or torch.cuda.get_allocator_backend() != "native":
        return None
    try:
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=_MOST_ENTRIES)
        return History(torch, index)
    except (AttributeError, LookupError, TypeError):
        return None


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether the allocator has its default settings, as far as they decide which block is given out."""
    changed = any(settings.get(name, default) != default for name, default in _DEFAULTS.items())
    return not changed and not any(settings.get("roundup_power2_divisions", {}).values())
