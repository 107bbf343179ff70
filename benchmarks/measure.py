"""One way of finding a batch size, measured in one place: a fork searches and trains on, another one starts afresh.

Each measurement is a fork of this process, which has imported everything and touched no device. What becomes of the
state is read before and after: where values are computed by a hash of every bit, on a virtual GPU by what can be told
there (bytes, counts, the position of the random numbers).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import random
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from autobatch.device.local import resolve_local
from autobatch.device.oom import is_oom
from autobatch.probe.executor import describe

DEADLINE_S = 240.0
STEPS = 3
"""Steps of a trial: the default of Lightning and of autobatch, given to all."""
STEPS_AFTER = 20
"""Steps that an answer must survive."""
HISTORIES = ("fresh", "small", "failed")
LIBRARIES = ("accelerate", "lightning", "transformers", "torchvision")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the memory is: ``cuda:0`` or ``cpu``, and what a workload may have of it at most."""

    device: str
    limit_bytes: int | None = None

    def open(self) -> Any:
        return resolve_local(self.device, memory_limit_bytes=self.limit_bytes)


@dataclass(kw_only=True)
class Task:
    """What a search is given. Nothing is built and no device is touched before it is asked for."""

    build: Callable[..., Any]
    place: Place
    attempts: list[list[int]] = field(default_factory=list)
    """Each size that was tried, with the steps that ended."""

    @functools.cached_property
    def device(self) -> Any:
        return self.place.open()

    @functools.cached_property
    def workload(self) -> Any:
        from autobatch.probe.workload.building import build

        return build(self.build, self.place.device)

    def train(self, size: int, steps: int = STEPS) -> None:
        """A plain loop in a function, as written by hand: it begins with ``zero_grad``, and its locals end with it."""
        self.attempt(size)
        self.workload.model.zero_grad(set_to_none=True)
        try:
            for _ in range(steps):
                self.workload.train_step(size)
                self.device.synchronize()
                self.step()
        finally:
            self.workload._last = None

    def clean_up(self) -> None:
        """Lets go of what a failure left. Not inside an except block, where the traceback keeps its tensors."""
        self.workload.model.zero_grad(set_to_none=True)
        gc.collect()
        self.device.release()

    def attempt(self, size: int) -> None:
        self.attempts.append([size, 0])

    def step(self) -> None:
        self.attempts[-1][1] += 1


@dataclass(kw_only=True)
class Found:
    """What a search answered, how training goes on, and the counts that it knows better than :class:`Task`."""

    answer: int
    go_on: Callable[[], None]
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A way of finding a batch size. ``limits_itself``: it has an argument for the limit of the place."""

    search: Callable[[Task], Found]
    about: str
    limits_itself: bool = False
    owns_workload: bool = False
    """True where the search builds the workload elsewhere, so that there is none of the caller's meanwhile."""
    takes: Callable[[str], bool] = lambda workload: True
    """Whether it can be given the workload of this name."""
    trains: Callable[[Task, int, int], Any] = Task.train
    """Trains on the workload with batches of so many samples for so many steps, as one that starts afresh does."""


def measure(name: str, peer: Peer, build: Callable[..., Any], place: Place) -> dict[str, Any]:
    """Everything that is told of ``peer`` in one cell; ``error`` where it came to no answer."""
    row = {"peer": name, **forked(lambda: _searched(peer, Task(build=build, place=place)))}
    if row.get("answer"):
        row["survives_fresh"] = survives(build, place, row["answer"], trains=peer.trains)
    return row


@functools.cache
def survives(
    build: Callable[..., Any],
    place: Place,
    size: int,
    history: str = "fresh",
    *,
    trains: Callable[[Task, int, int], Any] = Task.train,
) -> bool | None:
    """Whether training at ``size``, plain unless ``trains`` is given, gets through its steps in a new process; None if
    it failed otherwise.

    ``history`` is what the process did before: nothing, two steps of one sample, or one failed attempt, as in
    ``benchmarks/truth.py``.
    """
    task = Task(build=build, place=place)

    def run() -> dict[str, Any]:
        with task.device.restrict(None):
            if history == "small":
                task.train(1, 2)
            elif history == "failed":
                _survived(lambda: task.train(size + size // 2, 1))
                task.clean_up()
            return {"survives": _survived(lambda: trains(task, size, STEPS_AFTER))}

    return forked(run).get("survives")


def largest_surviving(build: Callable[..., Any], place: Place, near: list[int]) -> int:
    """The truth where nobody measured it before: a size that survives all three histories while the next does not, to
    half a percent, looked for around the answers ``near``."""

    def holds(size: int) -> bool:
        return all(survives(build, place, size, history) for history in HISTORIES)

    low = next((size for size in sorted(set(near), reverse=True) if holds(size)), 0)
    high = max(low + 1, int(1.05 * low))
    while holds(high):
        low, high = high, max(high + 1, int(1.05 * high))
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def environment(place: Place) -> dict[str, Any]:
    """Where and with what this is measured: the device as torch sees it, and versions.

    Ends the program where there is no such device.
    """
    known = forked(lambda: describe(place.open()))
    if "error" in known:
        raise SystemExit(f"{place.device} is not here: {known['error']}")
    kept = {key: known.get(key) for key in ("device", "driver", "torch", "cuda", "python", "autobatch")}
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        **kept,
        "virtual": is_virtual(place),
        "limit_bytes": place.limit_bytes,
        "libraries": versions,
        # torch's own variable: matrix products of fp32 in the format of tensor cores.
        "tf32": os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1",
        "cpus": os.cpu_count(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _searched(peer: Peer, task: Task) -> dict[str, Any]:
    limit = contextlib.nullcontext() if peer.limits_itself else task.device.restrict(None)
    with limit:
        before = None if peer.owns_workload else _state(task)
        retries = None if peer.owns_workload else task.device.retries()
        started_s = time.monotonic()
        found = peer.search(task)
        row: dict[str, Any] = {"answer": found.answer, "seconds": round(time.monotonic() - started_s, 2)}
        attempts = [list(attempt) for attempt in task.attempts]
        row |= {
            "trials": len(attempts),
            "failures": sum(steps < STEPS for _, steps in attempts),
            "retries": None if retries is None else task.device.retries() - retries,
            "samples": sum(size * steps for size, steps in attempts),
            "samples_confirming": 0,
            "seconds_confirming": 0.0,
            "asked": [f"{size}{'' if steps >= STEPS else 'x'}" for size, steps in attempts],
            "changed": [] if before is None else [key for key, value in _state(task).items() if before[key] != value],
        } | found.counts
    with task.device.restrict(None):
        row["survives_same"] = _survived(found.go_on)
    return row


def _survived(run: Callable[[], None]) -> bool:
    try:
        run()
    except Exception as exc:
        if not is_oom(exc):
            raise
        return False
    return True


def _state(task: Task) -> dict[str, Any]:
    """What a search may change, each by a name for people."""
    import torch

    from autobatch.probe.state import fingerprint

    workload, found = task.workload, {"python random numbers": hash(random.getstate())}
    gc.collect()
    found["random numbers"] = _digest(torch.get_rng_state())
    found["gradients"] = sum(parameter.grad is not None for parameter in workload.model.parameters())
    found["optimizer state"] = len(workload.optimizer.state)
    found["mode"] = workload.model.training
    found["place of the model"] = str(workload.device)
    if task.place.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # torch's own, not of the workload
        found["GPU random numbers"] = _digest(torch.cuda.get_rng_state())
        found["allocated bytes"] = torch.cuda.memory_allocated()
    if not is_virtual(task.place):
        found["values"] = fingerprint(*workload.stateful, torch_device=task.place.device)
    return found


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def is_virtual(place: Place) -> bool:
    from autobatch.virtual.attach import present_state

    return place.device != "cpu" and present_state() is not None


def forked(run: Callable[[], dict[str, Any]], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """What ``run`` returns in a process of its own; ``error`` if it raises, dies, or is not done in time."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _answer(run, write, folder)
        os.close(write)
        try:
            if not select.select([read], [], [], deadline_s)[0]:
                return {"error": f"not done after {deadline_s:.0f} s"}
            with os.fdopen(os.dup(read)) as pipe:
                text = pipe.read()
            if text:
                result: dict[str, Any] = json.loads(text)
                return result
            return {"error": f"the process died with {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"}
        finally:
            os.close(read)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _answer(run: Callable[[], dict[str, Any]], write: int, folder: str) -> None:
    """The fork's part. Trainers print and leave files: neither is to be seen afterwards."""
    try:
        os.chdir(folder)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        result = run()
    except BaseException as exc:  # noqa: BLE001 - told to the other side, which prints it
        where = traceback.extract_tb(exc.__traceback__)[-1]
        result = {
            "error": f"{type(exc).__name__}: {str(exc)[:300]} ({os.path.basename(where.filename)}:{where.lineno})"
        }
    with os.fdopen(write, "w") as pipe:
        pipe.write(json.dumps(result))
    os._exit(0)
