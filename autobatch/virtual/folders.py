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


def make_folder(prefix: str, place: Path) -> Path:
    """A new folder in ``place`` that only this user can enter. Those that killed makers left there are removed."""
    _sweep(prefix, place)
    maker = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{maker}-{start_time(maker)}-", dir=place))


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder where temporary ones are kept, removed on leaving."""
    folder = make_folder(prefix, Path(tempfile.gettempdir()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(prefix: str, place: Path) -> None:
    """Removes the folders of makers that were killed, which could not do it themselves.

    Not the young ones: their maker may live in another container, whose process ids are not ours.
    """
    for folder in place.glob(f"{prefix}*-*-*"):
        pid, started = folder.name.removeprefix(prefix).split("-")[:2]
        with contextlib.suppress(OSError, ValueError):  # somebody else's, or just swept by another process
            old = time.time() - folder.stat().st_mtime > _OLD_S
            if old and str(start_time(int(pid))) != started:
                shutil.rmtree(folder)
