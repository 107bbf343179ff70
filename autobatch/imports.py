"""Imports of large libraries, and the end of a process that has them."""

from __future__ import annotations

import atexit
import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Inside, no garbage is collected: an import makes much and drops little, a fifth of its time goes into looking.

    A program that has switched collections off keeps them off.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def imports_of_a_command() -> Iterator[None]:
    """Inside, no garbage is collected, and at the end of the process none: to look once more at all that torch has made
    takes half a second. For a command of ours; a program of the user's may have what waits for that.
    """
    _collect_nothing_at_the_end()
    with without_collections():
        yield


@functools.cache
def _collect_nothing_at_the_end() -> None:
    atexit.register(gc.freeze)
