"""SIGTERM, which is how a scheduler asks a run to end: noted, and obeyed when a window is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + 15
"""Of a process that SIGTERM ended, as a shell tells it."""


class Stopping:
    """Whether the run was asked to end."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of obeyed. Only the main thread can; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
