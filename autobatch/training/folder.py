"""The folder of a run's checkpoints: its newest one, and that no other run writes into it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from autobatch.errors import AutobatchWarning, InvalidArgumentError
from autobatch.training.checkpoint import newest

Agreed = Callable[[Callable[[], Any]], list[Any]]


class Folder:
    """A folder for checkpoints, which is made when a run begins; or None.

    Args:
        path: as the user gave it.
        agreed: runs a function on every rank, and raises on all where it raises on one.
        is_writer: whether this rank is the one that writes.
    """

    def __init__(self, path: str | Path | None, agreed: Agreed, is_writer: bool) -> None:
        self.path = None if path is None else Path(path)
        self._agreed, self._is_writer = agreed, is_writer

    def newest(self, resume: bool) -> Path | None:
        """The checkpoint to go on from, rank 0's for all.

        Raises:
            InvalidArgumentError: if there is one and ``resume`` is False.
        """
        found: Path | None = self._agreed(lambda: self._newest(resume))[0]
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps two runs from writing into one folder.

        Raises:
            InvalidArgumentError: if another run does, or it cannot be written into.
        """
        locks: list[FileLock] = []
        try:
            self._agreed(lambda: self._lock(locks))
            yield
        finally:
            for lock in locks:
                lock.release()

    def _newest(self, resume: bool) -> Path | None:
        found = [] if self.path is None else newest(self.path)
        if found and not resume:
            raise InvalidArgumentError("checkpoint", str(self.path), "a folder without checkpoints, or resume=True")
        return found[0] if found else None

    def _lock(self, locks: list[FileLock]) -> None:
        if self.path is None or not self._is_writer:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            allowed = "a folder that no other run writes into"
            raise InvalidArgumentError("checkpoint", str(self.path), allowed) from None
        except NotImplementedError:  # a file system that knows no locks
            warnings.warn(f"{self.path} cannot be locked: let no other run write there", AutobatchWarning, stacklevel=2)
            return
        except OSError as exc:
            allowed = f"a folder that can be written ({exc.strerror})"
            raise InvalidArgumentError("checkpoint", str(self.path), allowed) from exc
        locks.append(lock)
