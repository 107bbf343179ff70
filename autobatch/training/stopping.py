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
        self._is_heeded = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of obeyed. Only the main thread can; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True
            if self._is_heeded:
                raise SystemExit(EXIT_CODE)

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: it was not Python's

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where a checkpoint is written already, SIGTERM ends the run without waiting for a window."""
        self._is_heeded = True
        try:
            if self.asked:  # after all ranks were asked whether one was
                raise SystemExit(EXIT_CODE)
            yield
        finally:
            self._is_heeded = False
