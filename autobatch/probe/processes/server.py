"""The processes in which trials run, as their prober sees them: a server that imports, and workers that it forks.

The child's side is :mod:`autobatch.probe.processes.worker`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import autobatch
from autobatch.device.oom import Tier, classify_exit
from autobatch.device.process import out_of_memory_kills
from autobatch.errors import WorkloadFailedError
from autobatch.probe.processes.errors import ChildTraceback, SilenceError, StrandedError, WorkerLostError
from autobatch.probe.processes.messages import FORK, NEXT_JOB, NUMBER, Failure, Job, SignatureRequest
from autobatch.replay.trace import Trace
from autobatch.result import Trial

if TYPE_CHECKING:  # a server can be started before torch is imported here
    from autobatch.probe.executor import Setting
    from autobatch.probe.trial import TrialRequest
    from autobatch.probe.workload.signature import Signature

ANSWER_WITHIN_S = 600.0
"""A worker that is silent for so long hangs. Long enough for any trial of a few steps, compilation included."""

_LOOK_S = 0.1  # how often to look whether another rank's process has failed


class WorkerSource(Protocol):
    """Where workers come from, one after the other."""

    @property
    def is_host(self) -> bool:
        """Whether they train on host memory, where a crash may be a refusal of memory."""

    @property
    def makes_many(self) -> bool:
        """False where it is a worker itself, and ends with it."""

    def ready(self) -> None:
        """Waits until it can make workers, once. Raises what its imports raised."""

    def start_worker(self) -> tuple[int, Connection]:
        """A new worker: its pid and the connection to it."""

    def wait_status(self) -> int:
        """How the last worker ended, as ``waitpid`` tells it; waits for that."""

    def close(self) -> None:
        """Ends what is left for this search."""


class Meeting(Protocol):
    """Where the workers of several ranks meet."""

    def environment(self) -> Mapping[str, str]:
        """What a worker must be told to come there, as ``init_process_group()`` reads it."""

    def has_failed(self) -> bool:
        """Whether some rank has said that its worker failed."""


class Server:
    """The child that imports everything, torch first. Its whole session is killed at the end, grandchildren included.

    Args:
        environment: all its variables.
        paths: where it finds modules, as ``multiprocessing.spawn.prepare()`` takes it.
    """

    def __init__(self, environment: Mapping[str, str], paths: Mapping[str, Any]) -> None:
        self.environment, self.paths = environment, paths
        self.is_host = self.makes_many = False  # until it has a job, and says so
        self._job: Job | None = None
        self._worker_status: int | None = None  # how the last worker ended
        self._is_at_rest = False  # it can make workers, and has none
        self._is_closed = False  # when it is, its number may be another's
        self._answer_within_s = ANSWER_WITHIN_S
        self.channel, theirs = socket.socketpair()
        root = str(Path(autobatch.__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from autobatch.probe.processes.worker import serve"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"{code}; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._tell(dict(paths))
        except BaseException:
            self.close()
            raise

    def can_take(self, job: Job) -> bool:
        """Whether it can be given ``job``: it lives, and has had none, or has no worker now and the same variables."""
        if self._is_closed or self._status(wait=False) is not None:
            return False
        former = self._job
        return former is None or (self._is_at_rest and (former.main, former.variables) == (job.main, job.variables))

    def give(self, job: Job, answer_within_s: float) -> None:
        """Tells what its workers are to do."""
        former, self._job, self._is_at_rest = self._job, job, False
        self.is_host, self.makes_many, self._answer_within_s = job.device == "cpu", False, answer_within_s
        if former is not None:
            with contextlib.suppress(ConnectionError):
                self.channel.sendall(NEXT_JOB)
        self._tell(job)

    def _tell(self, message: object) -> None:
        with Connection(os.dup(self.channel.fileno())) as talk, contextlib.suppress(ConnectionError):
            talk.send(message)  # one that is gone already: ready() says why

    def ready(self) -> None:
        try:
            with Connection(os.dup(self.channel.fileno())) as talk:
                self.makes_many = bool(_answer(talk, self._answer_within_s, "importing the workload"))
        except (EOFError, ConnectionError):
            error = self._lost("while it imported")
            self.close()
            raise error from None
        except BaseException:
            self.close()
            raise
        self._is_at_rest = self.makes_many

    def start_worker(self) -> tuple[int, Connection]:
        self._worker_status, self._is_at_rest = None, False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.channel, [FORK], [theirs.fileno()])
            except ConnectionError:
                ours.close()
                raise self._lost() from None
        connection = Connection(ours.detach())
        return (self._read_number() if self.makes_many else self.process.pid), connection

    def wait_status(self) -> int:
        if not self.makes_many:
            return self._status(wait=True) or 0
        if self._worker_status is None:  # it is told once, and an interrupt may come before it is handed on
            self._worker_status = self._read_number()
        self._is_at_rest = True
        return self._worker_status

    def close(self) -> None:
        self.channel.close()
        if not self._is_closed:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal what has ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self._is_closed = True
            self.process.wait()

    def _read_number(self) -> int:
        data = b""
        while len(data) < NUMBER.size:
            try:
                part = self.channel.recv(NUMBER.size - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise self._lost()
            data += part
        number: int = NUMBER.unpack(data)[0]
        return number

    def _lost(self, doing: str = "") -> WorkloadFailedError:
        """The error that says how it ended. Waits for that."""
        return WorkloadFailedError(f"the child process {_end(self._status(wait=True) or 0)} {doing}".rstrip())

    def _status(self, *, wait: bool) -> int | None:
        """How it ended, as ``waitpid`` tells it; None if it lives. It is not reaped: nobody else is to have its number
        before :meth:`close` has sent a signal there.
        """
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            returncode = self.process.wait() if wait else self.process.poll()
            return None if returncode is None else _as_wait_status(returncode)
        try:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG))
        except ChildProcessError:  # somebody else has reaped it
            return 0
        if ended is None:
            return None
        return ended.si_status << 8 if ended.si_code == os.CLD_EXITED else ended.si_status


class Worker:
    """One process that runs trials.

    Args:
        meeting: where it meets the workers of other ranks, with whom it is stranded if one of them fails.
    """

    def __init__(self, source: WorkerSource, answer_within_s: float, meeting: Meeting | None = None) -> None:
        self._source, self._answer_within_s, self._meeting = source, answer_within_s, meeting
        self._kills_before = out_of_memory_kills()
        self._status: int | None = None
        self.has_tried = False
        self._pid, self._connection = source.start_worker()
        try:
            if meeting is not None:
                self._connection.send(meeting.environment())
            self.setting: Setting = _answer(self._connection, answer_within_s, "building the workload", meeting)
        except (EOFError, ConnectionError):
            raise WorkloadFailedError(f"the child process {_end(self._reap())} while it built the workload") from None
        except BaseException:
            self.close()
            raise

    def signature(self, batch_size: int) -> Signature:
        signature: Signature = self._exchange(SignatureRequest(batch_size), "looking at the workload")
        return signature

    def ask(self, request: TrialRequest) -> tuple[Trial, BaseException | None, Trace | None]:
        """The parts of an :class:`~autobatch.probe.trial.Attempt`."""
        self.has_tried = True
        trial, suspect, trace = self._exchange(request, f"batch {request.batch_size}")
        return trial, suspect.exception if suspect is not None else None, trace

    def _exchange(self, request: TrialRequest | SignatureRequest, doing: str) -> Any:
        try:
            self._connection.send(request)
            return _answer(self._connection, self._answer_within_s, doing, self._meeting)
        except (EOFError, ConnectionError):
            status = self._reap()
            raise WorkerLostError(f"the child process {_end(status)}", self._meaning(status)) from None
        except SilenceError as exc:
            self.close()
            raise WorkerLostError(str(exc), None) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process without waiting for what it does."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _meaning(self, status: int) -> Tier | None:
        """What the worker's end says about memory: the kernel kills for lack of it, a limit makes code crash."""
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        killed_for_memory = out_of_memory_kills() != self._kills_before
        exhausted = killed_for_memory if number == signal.SIGKILL else self._source.is_host
        return classify_exit(number, memory_exhausted=exhausted)

    def _reap(self) -> int:
        if self._status is None:
            self._connection.close()
            self._status = self._source.wait_status()
        return self._status


def _answer(connection: Connection, within_s: float, doing: str, meeting: Meeting | None = None) -> Any:
    until_s, wait_s = time.monotonic() + within_s, within_s if meeting is None else min(within_s, _LOOK_S)
    while not connection.poll(wait_s):
        if meeting is None or time.monotonic() >= until_s:
            raise SilenceError(f"{doing}: no answer within {within_s:.0f} s")
        if meeting.has_failed():
            raise StrandedError(f"{doing}: another rank's process failed, which this one waited for")
    answer = connection.recv()
    if isinstance(answer, Failure):
        raise answer.exception from ChildTraceback(answer.traceback_text)
    return answer


def _end(status: int) -> str:
    """How a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)} and without an answer"


def _as_wait_status(returncode: int) -> int:
    return -returncode if returncode < 0 else returncode << 8
