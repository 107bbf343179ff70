"""A run of this process whose allocations are recorded, by whichever history its allocator has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from autobatch.replay.trace import Trace, trace_of


class History(Protocol):
    """What is allocated from its beginning to its end."""

    place: str
    """The device of the allocator: ``"cuda:0"``, ``"cpu"``."""
    ran_out: bool
    """Whether it refused memory without an error of Python's, known once the history is finished."""

    def step_ended(self) -> None:
        """Called after each step."""

    def finish(self) -> dict[str, Any] | None:
        """Ends it, and gives all of it as :func:`autobatch.replay.trace.trace_of` takes it; None where not all was
        told, or where it has ended."""

    def end(self) -> None:
        """Records no more."""


class RecordedRun:
    """A run that is recorded. Meets :class:`~autobatch.device.base.Recording`."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.step_ended = history.step_ended

    def finish(self) -> Trace | None:
        told = self._history.finish()
        return None if told is None else trace_of(**told)


@contextmanager
def recording(history: History | None) -> Iterator[RecordedRun | None]:
    """Ends ``history`` on leaving; None where there is none."""
    if history is None:
        yield None
        return
    try:
        yield RecordedRun(history)
    finally:
        history.end()
