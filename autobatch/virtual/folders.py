"""Temporary folders that bear their maker's name, so that those of a maker that was killed can be told and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from autobatch.virtual.state import start_time

_OLD_S = 24 * 3600.0


def make_folder(prefix: str, place: Path, *, ends_with_maker: bool = False) -> Path:
    """A new folder in ``place`` that only this user can enter. Those that killed makers left there are removed.

    Args:
        ends_with_maker: whether nobody else uses it, so that it can go as soon as its maker is known to be gone.
    """
    _sweep(prefix, place, at_once=ends_with_maker)
    maker = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{maker}-{start_time(maker)}-{_numbering()}-", dir=place))


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder where temporary ones are kept, removed on leaving."""
    folder = make_folder(prefix, Path(tempfile.gettempdir()), ends_with_maker=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(prefix: str, place: Path, *, at_once: bool) -> None:
    """Removes the folders of makers that were killed, which could not do it themselves.

    A young one only where its maker's process id is one of ours: in another container it may be alive.
    """
    here = _numbering()
    for folder in place.glob(f"{prefix}*-*-*"):
        pid, started, *numbering = folder.name.removeprefix(prefix).split("-")[:-1]
        with contextlib.suppress(OSError, ValueError):  # somebody else's, or just swept by another process
            is_known = at_once and bool(here) and numbering == [here]
            old = time.time() - folder.stat().st_mtime > _OLD_S
            if (is_known or old) and str(start_time(int(pid))) != started:
                shutil.rmtree(folder)


def _numbering() -> str:
    """Whose process ids these are: the kernel since it started, and the namespace; empty if that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
