"""Signals that ask a command to end: it ends as by an interrupt, its child processes and files with it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from autobatch.cli.errors import Terminated

_ENDS = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))  # not on Windows


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM, and SIGHUP of a terminal that is closed, end the command as an interrupt does.

    The child processes go, and a virtual GPU's files.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    handlers = {number: signal.getsignal(number) for number in _ENDS}
    # One that is ignored, as under nohup, stays so, and what is not Python's cannot be put back.
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
