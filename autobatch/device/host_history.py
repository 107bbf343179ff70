"""What torch allocates on the host, recorded by its profiler, which tells each allocation and its end.

Of the profiler only its core is asked, which takes a few milliseconds, and not for operators, of which there are many.
No public function gives that: where another torch has it otherwise, nothing is recorded, and nothing else is wrong.
Uses the standard library alone, and the torch that it is given, for the start-up hook loads it by its file.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_MOST_ENTRIES = 120_000  # longer runs are not replayed: doing so some thirty times would take too long
_STEP_ENDED = "autobatch: a step has ended"
_REFUSED = "[OutOfMemory]"  # the profiler's name for it
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


class History:
    """The history of this thread's allocations, from :func:`begin` to :meth:`end`."""

    place = "cpu"

    def __init__(self, torch: Any, threshold_bytes: int) -> None:
        self._torch, self._threshold_bytes = torch, threshold_bytes
        self._steps, self._is_over = 0, False
        self.ran_out = False
        """Whether torch was refused memory, known once this is finished."""

    def step_ended(self) -> None:
        """Called after each step."""
        with self._torch.profiler.record_function(_STEP_ENDED):
            self._steps += 1

    def finish(self) -> dict[str, Any] | None:
        """Ends this, and gives what happened and the allocations up to the end of each step, as
        :func:`autobatch.replay.trace.trace_of` takes them; None where it is not all there."""
        results = self.end()
        if results is None:
            return None
        try:
            entries, steps, self.ran_out = _read(results, self._torch._C._profiler._EventType.Allocation)
        except Exception:  # noqa: BLE001 - what is private may be anything, and the run has not failed
            return None
        if self.ran_out or len(entries) >= _MOST_ENTRIES or len(steps) != self._steps:
            return None
        return {"before": [], "entries": entries, "steps": steps, "mapped_from_bytes": self._threshold_bytes}

    def end(self) -> Any:
        """Records no more. Gives what the profiler has, None if it was asked before or is somebody else's by now."""
        if self._is_over or not self._torch._C._autograd._profiler_enabled():
            return None
        self._is_over = True
        with _silence():
            return self._torch._C._autograd._disable_profiler()


def begin(torch: Any) -> History | None:
    """Begins to record; None where somebody else uses the profiler, torch has none that tells it, or malloc is not one
    that can be modelled (:mod:`autobatch.replay.malloc`)."""
    threshold_bytes = _threshold_bytes()
    if threshold_bytes is None:
        return None
    try:
        autograd, core = torch._C._autograd, torch._C._profiler
        if autograd._profiler_enabled():
            return None
        about = core.ProfilerConfig(
            core.ProfilerState.KINETO, False, True, False, False, False, core._ExperimentalConfig()
        )
        activities, scopes, older = {core.ProfilerActivity.CPU}, {core.RecordScope.USER_SCOPE}, torch.empty(1)
        with _silence():
            autograd._prepare_profiler(about, activities)
            autograd._enable_profiler(about, activities, scopes)
            del older  # of the first end of what is older than the profiler it warns
        return History(torch, threshold_bytes)
    except Exception:  # noqa: BLE001 - as above
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, nothing is heard of this process's errors: the profiler writes there that it begins and ends."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed, or there is no room for another file
        yield
        return
    try:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _read(results: Any, allocation: Any) -> tuple[list[tuple[str, int, int, int]], list[int], bool]:
    """Action, address, size and stream of each allocation and its end, how many allocations there had been when each
    step ended, and whether one was refused."""
    entries: list[tuple[str, int, int, int]] = []
    steps: list[int] = []
    events, left, count = [], list(results.experimental_event_tree()), 0
    while left:
        event = left.pop()
        events.append(event)
        left += event.children
    for event in sorted(events, key=lambda event: int(event.start_time_ns)):
        if event.tag == allocation:
            about = event.extra_fields
            # What is reserved is a mapping that other processes see, such as a loader's worker: no private data.
            if about.device.type == "cpu" and not about.total_reserved:
                action = "alloc" if about.alloc_size > 0 else "free_completed"
                entries.append((action, about.ptr, abs(about.alloc_size), 0))
                count += about.alloc_size > 0
        elif event.name == _STEP_ENDED:
            steps.append(count)
    return entries, steps, any(event.name == _REFUSED for event in events)


def _threshold_bytes() -> int | None:
    """From how many bytes on this process's malloc takes memory from the system for an allocation by itself; None where
    it has not been told, and changes it as it goes."""
    try:
        return int(os.environ[_THRESHOLD])
    except (KeyError, ValueError):
        return None
