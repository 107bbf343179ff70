"""What a run allocates on a GPU of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autobatch.device.history import History, begin
from autobatch.replay.trace import Trace, trace_of


class CudaRecording:
    """A run that is recorded. Meets :class:`~autobatch.device.base.Recording`."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.step_ended = history.step_ended

    def trace(self) -> Trace | None:
        told = self._history.told()
        return None if told is None else trace_of(**told)


@contextmanager
def recording(index: int) -> Iterator[CudaRecording | None]:
    """Records inside what the GPU's allocator does; None where somebody else does so, or torch has no such history."""
    history = begin(torch, index)
    if history is None:
        yield None
        return
    try:
        yield CudaRecording(history)
    finally:
        history.end()
