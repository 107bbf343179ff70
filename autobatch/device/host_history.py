"""What torch allocates on the host, recorded by its profiler, which tells each allocation and its end.

Of the profiler only its core is asked, which takes a few milliseconds, and not for operators, of which there are many.
No public function gives that: where another torch has it otherwise, nothing is recorded, and nothing else is wrong.
Imports no torch, and uses the one that it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autobatch.replay.trace import Trace, trace_of

_MOST_ENTRIES = 120_000  # longer runs are not replayed: doing so some thirty times would take too long
_STEP_ENDED = "autobatch: a step has ended"
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


class HostRecording:
    """A run on the host that is recorded. Meets :class:`~autobatch.device.base.Recording`."""

    def __init__(self, torch: Any, threshold_bytes: int) -> None:
        self._torch, self._threshold_bytes = torch, threshold_bytes
        self._steps, self._is_over = 0, False

    def step_ended(self) -> None:
        with self._torch.profiler.record_function(_STEP_ENDED):
            self._steps += 1

    def trace(self) -> Trace | None:
        """What was asked for so far; nothing is recorded after it."""
        try:
            entries, steps = _told(self.end(), self._torch._C._profiler._EventType.Allocation)
            if len(entries) >= _MOST_ENTRIES or len(steps) != self._steps:
                return None
            return trace_of((), entries, steps, mapped_from_bytes=self._threshold_bytes)
        except Exception:  # noqa: BLE001 - what is private may be anything, and the run has not failed
            return None

    def end(self) -> Any:
        """Records no more; what the profiler has, None if it was asked before or is somebody else's by now."""
        if self._is_over or not self._torch._C._autograd._profiler_enabled():
            return None
        self._is_over = True
        with _silence():
            return self._torch._C._autograd._disable_profiler()


@contextmanager
def recording(torch: Any) -> Iterator[HostRecording | None]:
    """Records inside what torch allocates on the host; None where somebody else uses the profiler, torch has none that
    tells it, or malloc is not the one that is modelled (:mod:`autobatch.replay.malloc`)."""
    threshold_bytes = _threshold_bytes()
    recording = None if threshold_bytes is None else _begun(torch, threshold_bytes)
    try:
        yield recording
    finally:
        if recording is not None:
            recording.end()


def _begun(torch: Any, threshold_bytes: int) -> HostRecording | None:
    try:
        autograd, core = torch._C._autograd, torch._C._profiler
        if autograd._profiler_enabled():
            return None
        about = core.ProfilerConfig(
            core.ProfilerState.KINETO, False, True, False, False, False, core._ExperimentalConfig()
        )
        activities, older = {core.ProfilerActivity.CPU}, torch.empty(1)
        with _silence():
            autograd._prepare_profiler(about, activities)
            autograd._enable_profiler(about, activities, {core.RecordScope.USER_SCOPE})
            del older  # of the first end of what is older than the profiler it warns
        return HostRecording(torch, threshold_bytes)
    except Exception:  # noqa: BLE001 - as above
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, nothing is heard of this process's errors: the profiler writes there that it begins and ends."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _told(results: Any, allocation: Any) -> tuple[list[tuple[str, int, int, int]], list[int]]:
    """Allocations and their ends as :func:`~autobatch.replay.trace.trace_of` takes them, and how many allocations there
    had been when each step ended."""
    entries, steps, count = list[tuple[str, int, int, int]](), list[int](), 0
    events, left = [], list(results.experimental_event_tree())
    while left:
        event = left.pop()
        events.append(event)
        left += event.children
    for event in sorted(events, key=lambda event: int(event.start_time_ns)):
        if event.tag == allocation:
            about = event.extra_fields
            if about.device.type == "cpu":
                action = "alloc" if about.alloc_size > 0 else "free_completed"
                entries.append((action, about.ptr, abs(about.alloc_size), 0))
                count += about.alloc_size > 0
        elif event.name == _STEP_ENDED:
            steps.append(count)
    return entries, steps


def _threshold_bytes() -> int | None:
    """From how many bytes on this process's malloc takes memory from the system for an allocation by itself; None where
    it has not been told, and changes it as it goes."""
    try:
        return int(os.environ[_THRESHOLD])
    except (KeyError, ValueError):
        return None
