"""What torch's caching allocator is asked for, recorded by torch itself, which keeps a history for whoever wants it.

No public function gives it: where another torch has it otherwise, nothing is recorded, and nothing else is the matter.
Uses the standard library alone, and the torch that it is given, for the start-up hook loads it by its file.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_ENTRIES = 120_000  # longer runs are not recorded: replaying one some thirty times would take too long
_TELLING, _TOLD = ("alloc", "free_completed"), ("action", "addr", "size", "stream")
_DEFAULTS = {"expandable_segments": False, "garbage_collection_threshold": 0.0, "max_split_size": -1}
_HARMLESS = (
    "backend",
    "graph_capture_",
    "per_process_memory_fraction",
    "pinned_",
    "release_lock_on_cudamalloc",
    *_DEFAULTS,
)
"""What may stand in the settings: it decides nothing here, or has its default (which is looked at)."""


class History:
    """The history of one GPU's allocator, from :func:`begin` to :meth:`end`."""

    ran_out = False
    """Not told here: an error of the allocator is one of Python's, where it reaches that."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch, self._index = torch, index
        self.place = f"cuda:{index}"
        self._before = self._of_this_gpu(torch.cuda.memory_snapshot())
        self._allocations_before, self._retries_before = self._allocations(), self._count("num_alloc_retries")
        self._steps: list[int] = []
        self._is_over = False

    def step_ended(self) -> None:
        """Called after each step."""
        self._steps.append(self._allocations() - self._allocations_before)

    def finish(self) -> dict[str, Any] | None:
        """Ends this, and gives the segments there were before, what happened since and the allocations up to the end of
        each step, as :func:`autobatch.replay.trace.trace_of` takes them. None where it is not all there, or where
        another allocator's rules would be in force.
        """
        try:
            return None if self._is_over else self._told()
        finally:
            self.end()

    def end(self) -> None:
        """Records no more, and forgets what was."""
        if not self._is_over:
            self._is_over = True
            _end(self._torch)

    def _told(self) -> dict[str, Any] | None:
        try:
            snapshot = self._torch.cuda.memory._snapshot()
            entries = snapshot["device_traces"][self._index]
            if len(entries) >= _MOST_ENTRIES or not _is_plain(snapshot["allocator_settings"]):
                return None
            segments = (*self._before, *self._of_this_gpu(snapshot["segments"]))
            if any(segment["segment_pool_id"] != (0, 0) for segment in segments):
                return None  # a CUDA graph's own memory
            told = [[entry[name] for name in _TOLD] for entry in entries if entry["action"] in _TELLING]
            if self._steps and self._steps[-1] != sum(action == "alloc" for action, *_ in told):
                return None  # somebody has begun anew amid the steps
            gave_back = any(entry["action"] == "segment_free" for entry in entries)
            if gave_back and self._count("num_alloc_retries") == self._retries_before:
                return None  # the run empties the cache itself, which no list of allocations tells
            return {"before": self._before, "entries": told, "steps": self._steps}
        except Exception:  # noqa: BLE001 - a private function may fail in any way, and the run has not
            return None

    def _of_this_gpu(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [segment for segment in segments if segment["device"] == self._index]

    def _allocations(self) -> int:
        return self._count("allocation.all.allocated")

    def _count(self, name: str) -> int:
        return int(self._torch.cuda.memory_stats(self._index)[name])


def begin(torch: Any, index: int) -> History | None:
    """Begins to record; None where somebody else does so, where torch has no such history, or where another
    allocator's rules are in force."""
    try:
        if torch._C._cuda_isHistoryEnabled() or torch.cuda.get_allocator_backend() != "native":
            return None
        if not _is_plain(torch.cuda.memory._snapshot()["allocator_settings"]):
            return None
    except Exception:  # noqa: BLE001 - as above
        return None
    try:
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=_MOST_ENTRIES)
        return History(torch, index)
    except Exception:  # noqa: BLE001 - as above
        _end(torch)
        return None


def _end(torch: Any) -> None:
    torch.cuda.memory._record_memory_history(enabled=None)


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether the allocator has its default settings, as far as they decide which block is given out.

    Raises:
        KeyError: where this torch tells other settings.
    """
    told = [part.partition(":")[0].strip() for part in settings["PYTORCH_CUDA_ALLOC_CONF"].split(",")]
    # A list in brackets has commas too.
    unknown = [name for name in told if name and not name.startswith((*_HARMLESS, "roundup_power2_divisions"))]
    changed = any(settings[name] != default for name, default in _DEFAULTS.items())
    return not unknown and not changed and not any(settings["roundup_power2_divisions"].values())
