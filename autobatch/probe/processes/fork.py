"""Workers that are forks of the present process, for trials of what lives in it.

Fork and OpenMP do not go together: the pool of the thread that forks is not there in the fork, which waits for it for
ever. Each thread has a pool of its own, though, so a fork works in a thread that it has just started, with as many
threads as its parent uses. Nothing says that this holds for every library that a workload uses, so it is tried first.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from autobatch.device.process import share_heap
from autobatch.probe.executor import LocalExecutor
from autobatch.probe.processes.worker import answer_all, end_with_parent, ended_well, run_and_end

_TRIED_WITHIN_S = 5.0


class Forks:
    """A :class:`~autobatch.probe.processes.server.WorkerSource`. Each worker is the leader of a session of its own."""

    is_host = True
    makes_many = True

    def __init__(self, live: LocalExecutor) -> None:
        self._live, self._setting = live, live.setting()
        self._pid = 0
        self._found = mmap.mmap(-1, mmap.PAGESIZE)  # by the first fork, for those that follow
        live.spare()

    def ready(self) -> None:
        """It is, from the start."""

    def start_worker(self) -> tuple[int, Connection]:
        """A new worker: its pid and the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = _fork(lambda: self._be_worker(ours, Connection(theirs.detach())))
        return self._pid, Connection(ours.detach())

    def wait_status(self) -> int:
        """How the last worker ended, as ``waitpid`` tells it; waits for that, and ends what it started."""
        return _end_session(self._pid)

    def close(self) -> None:
        """No worker is left: each was reaped, and what it started ended with it."""
        self._live.spare_no_more()
        self._found.close()

    def _be_worker(self, parents: socket.socket, talk: Connection) -> NoReturn:
        parents.close()  # or the end of the prober would not be seen here
        found = pickle.loads(self._found) if self._found[0] else None
        began = pickle.dumps(self._live.begin_in_fork(found))
        self._found[: len(began)] = began
        talk.send(self._setting)
        run_and_end(talk, lambda: answer_all(talk, self._live))


def forks_are_safe() -> bool:
    """Whether a fork of this process can train: it tries a parallel operator and a backward pass, with a deadline.

    Where a backward pass has used an accelerator's threads, torch refuses it in a fork; and a lock that another thread
    holds is held for ever there.
    """
    return ended_well(_fork(_train_a_little), within_s=_TRIED_WITHIN_S)


def _train_a_little() -> NoReturn:
    status = 1
    try:
        weight = torch.ones(1 << 18, requires_grad=True)  # large enough for torch to share it out among its threads
        (weight * 2).sum().backward()
        status = 0
    finally:
        os._exit(status)  # at once: a refusal is an answer, not a traceback for the caller's terminal


def _fork(work: Callable[[], NoReturn]) -> int:
    """Forks this process to do ``work``, which ends it, in a thread of its own. The fork's pid."""
    sys.stdout.flush()
    sys.stderr.flush()  # or the fork would write what waits there once more
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python warns that a lock of another thread may be held for ever. That is what the deadlines are for.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()  # Ctrl-C is the prober's to handle, and what this process starts ends with it
        end_with_parent(parent)
        share_heap()  # a heap of the thread's own would have other holes than the one that training will use
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    finally:
        os._exit(1)


def _end_session(pid: int) -> int:
    """Waits for ``pid`` to end, kills what it has left behind, and returns its wait status."""
    if hasattr(os, "waitid"):  # which macOS has since Python 3.13
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that its number cannot be another's
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal what has ended
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]
