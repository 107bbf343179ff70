"""Makes this process part of a trial: it ends with its prober, tells how it fails, and its training is counted.

The prober and the processes of its command share one folder. ``request.json`` says what to do; ``alive`` is a pipe that
the prober holds open and never writes to; each process writes ``PID.json``, whole or not at all, and
``PID.history`` where its allocations were recorded.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, NoReturn

_FOLDER = os.environ.get("AUTOBATCH_TRIAL", "")
_FRACTION = "per_process_memory_fraction"  # a setting of torch's caching allocators, in force from their first byte

MOST_REFUSALS = 3
"""After so many out-of-memory errors with no step between them, no step is waited for."""

report: dict[str, Any] = {}
"""What the prober will read of this process."""


load: Callable[[str], Any]
"""Gives a module of autobatch by its path; the start-up hook's."""


def start(loader: Callable[[str], Any]) -> None:
    global load
    load = loader
    pipe = _open_pipe()
    with open(os.path.join(_FOLDER, "request.json"), encoding="utf-8") as file:
        request = json.load(file)
    _begin(pipe)
    os.register_at_fork(after_in_child=lambda: _begin(pipe))
    write()  # a process that says nothing more has at least been reached
    _hear_failures()
    sys.meta_path.insert(0, _TorchFinder(request))


def write() -> None:
    """Puts :data:`report` on disk, in one piece."""
    load("hook/report").write_report(_FOLDER, report)


def write_beside(kind: str, told: Any) -> None:
    """Puts ``told`` on disk beside :data:`report`, in one piece; nothing if there is nothing to tell."""
    if told is not None:
        load("hook/report").write_report(_FOLDER, told, kind)


def _open_pipe() -> int:
    """The end of the pipe that tells when the prober is gone; without the pipe it is gone already."""
    try:
        pipe = os.open(os.path.join(_FOLDER, "alive"), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        os._exit(1)
    os.set_blocking(pipe, True)
    return pipe


def _begin(pipe: int) -> None:
    """A process begins, by being started or by a fork: its report is empty, and it looks after its own end."""
    report.clear()
    report.update(pid=os.getpid(), command=list(sys.orig_argv), steps=0, done=False)
    threading.Thread(target=_end_with_prober, args=(pipe,), name="autobatch", daemon=True).start()


def _end_with_prober(pipe: int) -> None:
    try:
        os.read(pipe, 1)  # nothing is ever written: it returns when the last writer is gone
    except OSError:
        return  # the command has closed what it did not open
    os.kill(os.getpid(), signal.SIGKILL)


def _hear_failures() -> None:
    """Notes the exception that ends this process, by whichever of three ways it becomes known."""
    before, leave = sys.excepthook, sys.exit

    def excepthook(kind: Any, exc: BaseException, trace: Any) -> None:
        note_failure(exc)
        before(kind, exc, trace)

    def sys_exit(status: Any = None, /) -> NoReturn:
        handled = sys.exc_info()[1]
        # `except RuntimeError: ...; sys.exit(1)`, which is also how a process of torch.multiprocessing fails.
        if status not in (None, 0) and handled is not None:
            note_failure(handled)
        leave(status)

    sys.excepthook, sys.exit = excepthook, sys_exit
    # A program may put a hook of its own in the place of ours; the interpreter keeps the exception all the same.
    atexit.register(lambda: note_failure(getattr(sys, "last_value", None)))


def note_failure(exc: BaseException | None) -> None:
    """Writes down what ``exc``, which ends this process, says about memory."""
    if exc is None or report["done"] or "failure" in report or isinstance(exc, (SystemExit, KeyboardInterrupt)):
        return
    training = sys.modules.get("_autobatch_training")
    if training is not None:
        training.lift_limit()  # so that there is memory to tell that there was none
        report.update(training.measure())
    report["failure"] = _described(exc)
    write()


def _described(exc: BaseException) -> dict[str, Any]:
    oom = load("device/oom")
    tier = oom.classify(exc)
    return {"type": type(exc).__name__, "message": oom.first_line(exc), "tier": tier and tier.value}


class _TorchFinder:
    """Sees torch being imported: sets what must be set before, and attaches to it after. In front of all finders."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request, self._asking = request, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)  # by the other finders
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self._request["fraction"] is not None:
                _limit_allocator(self._request["fraction"])
            with load("imports").without_collections():
                execute(module)
            # Only now, for a finder is also asked by those who want to know whether there is a torch.
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            load("hook/training").attach(module, self._request)

        loader.exec_module = exec_module


def _limit_allocator(fraction: float) -> None:
    """Adds the limit to what the allocator is told, after all that the command has said itself.

    The older names are read only where the first is not set.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    theirs = next((os.environ[name] for name in names if os.environ.get(name)), "")
    parts = [part for part in theirs.split(",") if part]
    for part in [part for part in parts if part.partition(":")[0].strip() == _FRACTION]:
        parts.remove(part)
        fraction = min(fraction, float(part.partition(":")[2]))
    os.environ[names[0]] = ",".join([*parts, f"{_FRACTION}:{fraction!r}"])
