"""The child's side of :mod:`autobatch.probe.processes.server`.

One server imports torch and the workload's module, and touches neither the device nor CPU threads; each worker is
its fork, so that a fresh process costs a tenth of a second instead of all the imports. A worker builds the workload
and runs trials until it is told to end, loses its prober, or is lost itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from autobatch.errors import InvalidArgumentError
from autobatch.imports import without_collections
from autobatch.probe.processes.messages import FORK, NEXT_JOB, NUMBER, Job, SignatureRequest, portable

if TYPE_CHECKING:  # a server imports torch when it is told to, not before
    from autobatch.probe.executor import LocalExecutor

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRIED_WITHIN_S = 2.0  # a parallel operator takes milliseconds, or for ever


_importing_main = False


def check_not_importing_main() -> None:
    """Refuses a search that the main script starts while a child imports it.

    Raises:
        InvalidArgumentError: saying where the call belongs, as multiprocessing does.
    """
    if _importing_main:
        raise InvalidArgumentError(
            "workload",
            "a function of this script",
            "searched for under `if __name__ == '__main__':`, because the "
            "process of the trials imports the script to find it",
        )


def serve(descriptor: int) -> None:
    """The server: imports, says that it is ready, and forks a worker for each socket it is handed.

    It is told first where modules are found, and its job later: of the user's nothing runs before that. Another job may
    follow when the workers of the last one are gone.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the prober's to handle; it ends us
    channel = socket.socket(fileno=descriptor)
    talk = Connection(os.dup(descriptor))
    with _failure_ends_this(talk):
        spawn.prepare(talk.recv())
        _import_torch()
    goes_on = True
    while goes_on:
        with _failure_ends_this(talk):
            job = _next_job(talk)
            builder = _import(job)
        gc.freeze()  # what is imported is not garbage: each collection in a worker is spared looking at it
        fork_is_safe = _fork_is_safe()
        talk.send(fork_is_safe)
        goes_on = _serve_job(channel, builder, job, fork_is_safe)


@contextlib.contextmanager
def _failure_ends_this(talk: Connection) -> Iterator[None]:
    """An exception inside ends this process, and is raised again where its prober waits for an answer."""
    try:
        yield
    except BaseException as exc:  # noqa: BLE001 - whatever the user's module raises
        talk.send(portable(exc))
        sys.exit(0)


def _serve_job(channel: socket.socket, builder: Callable[..., Any], job: Job, fork_is_safe: bool) -> bool:
    """Makes a worker for each socket it is handed. Returns whether there will be another job."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if message != FORK:
            return message == NEXT_JOB
        server = os.getpid() if fork_is_safe else None
        pid = os.fork() if fork_is_safe else 0
        if pid == 0:
            end_with_parent(server)
            _be_worker(Connection(descriptors[0]), channel, builder, job)
        os.close(descriptors[0])
        channel.sendall(NUMBER.pack(pid))
        channel.sendall(NUMBER.pack(os.waitpid(pid, 0)[1]))


def _next_job(talk: Connection) -> Job:
    try:
        job: Job = talk.recv()
    except EOFError:  # the prober is gone, or needs no server
        os._exit(0)
    return job


def _import_torch() -> None:
    with without_collections():
        importlib.import_module("torch")
        # The first optimizer imports it, for a second or two: better once here than in every worker.
        importlib.import_module("torch._dynamo")
        importlib.import_module("autobatch.probe.executor")


def _import(job: Job) -> Callable[..., Any]:
    global _importing_main
    os.environ.update(job.variables)
    _importing_main = True
    spawn.prepare(dict(job.main))
    _importing_main = False
    builder: Callable[..., Any] = pickle.loads(job.payload)
    if hasattr(builder, "import_modules"):
        builder.import_modules()
    return builder


def _fork_is_safe() -> bool:
    """Whether a fork of this process can run a workload: it has not used CUDA, and no OpenMP pool hangs in the fork.

    A pool cannot be seen, so it is tried: a fork runs one parallel operator, with a deadline.
    """
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        return False
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            end_with_parent(server)  # it may hang, and then only its parent's end is left to end it
            torch.ones(1 << 18).add_(1)  # large enough for torch to share it out among its threads
            status = 0
        finally:
            os._exit(status)
    return ended_well(pid, within_s=_TRIED_WITHIN_S)


def ended_well(pid: int, *, within_s: float) -> bool:
    """Whether the child ``pid`` ends with 0 before the deadline, at which it is killed. It is reaped."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _be_worker(talk: Connection, channel: socket.socket, builder: Callable[..., Any], job: Job) -> NoReturn:
    channel.close()
    run_and_end(talk, lambda: _work(talk, builder, job))


def run_and_end(talk: Connection, work: Callable[[], NoReturn]) -> NoReturn:
    """Never returns: a fork must not run what its parent had left to do."""
    status = 1
    try:
        work()
    except (EOFError, ConnectionError):
        status = 0  # the prober is gone, or done with us
    except BaseException as exc:  # noqa: BLE001 - it is raised again, by the prober
        talk.send(portable(exc))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(talk: Connection, builder: Callable[..., Any], job: Job) -> NoReturn:
    from autobatch.device.local import resolve_local
    from autobatch.probe.executor import LocalExecutor, seeing_all
    from autobatch.probe.workload.building import build

    if job.meets:
        os.environ.update(talk.recv())
    device = resolve_local(job.device, memory_limit_bytes=job.memory_limit_bytes)
    with seeing_all():  # a model that the module has made counts
        device.begin()
    executor = LocalExecutor(build(builder, device.torch_device), device)
    talk.send(executor.setting())  # with nothing frozen: what building left for the collector is to be collected
    answer_all(talk, executor)


def answer_all(talk: Connection, executor: LocalExecutor) -> NoReturn:
    """Answers requests until the prober is gone or done, which is an EOFError."""
    while True:
        request = talk.recv()
        if isinstance(request, SignatureRequest):
            talk.send(executor.signature(request.batch_size))
            continue
        attempt = executor.run(request)
        suspect = portable(attempt.suspect) if attempt.suspect is not None else None
        talk.send((attempt.trial, suspect, attempt.trace))


def end_with_parent(parent_pid: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent dies. Elsewhere than Linux a closed pipe ends it.

    With ``parent_pid`` also one that has died already counts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
