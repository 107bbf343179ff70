"""The training of one process of a trial: counts its steps, keeps its memory to the limit, measures it, and ends it.

Attached to torch once that is imported, through torch's public hooks on optimizers and modules.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import time
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_BENCHMARKS = ("autotune", "benchmark", "select_algorithm", "triton_heuristics", "triton.testing")
"""Parts of the names of modules that try kernels out and mean to survive what that runs into."""

_REFUSED_BY_HOST = "DefaultCPUAllocator: can't allocate memory"

trial: Any = sys.modules.get("_autobatch_trial")  # which has loaded this module


class _Training:
    """What is known of this process's training."""

    def __init__(self, torch: Any, request: dict[str, Any]) -> None:
        self.torch, self.request = torch, request
        self.began_s = time.perf_counter()
        self.optimizer: weakref.ref[Any] | None = None
        """The first that stepped: where several take turns, as in a GAN, its steps are the training's."""
        self.out_of_memory = ""
        """The last out-of-memory error since a step ended. One that a step follows was caught."""
        self.refusals = 0
        """How many there have been since a step ended."""
        self.handles: list[Any] = []
        """Of hooks that wait for the first forward pass."""
        self.idle_resident_bytes: int | None = None
        self.old_peak_bytes = 0
        """What was resident at once before and may still be the kernel's mark."""
        self.idle_data_bytes = self.old_space_bytes = 0
        """What an idle process has of private data, and the most of the address space that was taken before."""
        self.has_holes = False
        """Whether the limit lets through what finds its place in the heap's holes, so that peaks are compared too."""
        self.soft_limit_bytes: int | None = None
        self.history: Any = None
        """What the allocator is asked for, where that is recorded."""

    def remove_handles(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


_training: _Training | None = None


def attach(torch: Any, request: dict[str, Any]) -> None:
    global _training
    _training = _Training(torch, request)
    os.register_at_fork(after_in_child=lambda: attach_anew(torch, request))
    optim = sys.modules["torch.optim.optimizer"]
    optim.register_optimizer_step_post_hook(_stepped)
    _notice_errors(torch)
    if request["records"] and request["kind"] == "cuda":
        modules = sys.modules["torch.nn.modules.module"]
        _training.handles.append(modules.register_module_forward_pre_hook(lambda module, inputs: _begin_history()))
    if request["kind"] == "cpu" and request["limit_bytes"] is not None:
        # The first forward pass: imports are done and the model is there. What is alive then counts as the workload's.
        modules = sys.modules["torch.nn.modules.module"]
        _training.handles.append(modules.register_module_forward_pre_hook(lambda module, inputs: _limit_host()))
        _training.handles.append(optim.register_optimizer_step_pre_hook(lambda *arguments: _limit_host()))


def attach_anew(torch: Any, request: dict[str, Any]) -> None:
    """A fork trains by itself, if at all; the limit, and what is known of the memory below it, are inherited."""
    global _training
    parent, _training = _training, _Training(torch, request)
    if parent is not None:
        _training.handles = parent.handles
        _training.soft_limit_bytes = parent.soft_limit_bytes
        _training.idle_resident_bytes, _training.old_peak_bytes = parent.idle_resident_bytes, parent.old_peak_bytes
        _training.idle_data_bytes, _training.old_space_bytes = parent.idle_data_bytes, parent.old_space_bytes
        _training.has_holes = parent.has_holes


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    state, report = _training, trial.report
    if state is None:
        return
    if state.optimizer is None or state.optimizer() is None:
        state.optimizer = weakref.ref(optimizer)
    if state.optimizer() is not optimizer:
        return
    if state.out_of_memory and not report["done"]:
        report.update(caught=state.out_of_memory, **measure())
        _finish()
    if not report["done"]:
        _count(state, report)
    if report["steps"] >= state.request["steps"]:
        _finish()


def _begin_history() -> None:
    """Allocations are recorded from the first forward pass on a GPU: before it nothing tells where that will be."""
    state = _training
    if state is None or state.torch.compiler.is_compiling() or not state.torch.cuda.is_initialized():
        return
    state.remove_handles()
    state.history = trial.load("device/cuda_history").begin(state.torch, state.torch.cuda.current_device())


def _count(state: _Training, report: dict[str, Any]) -> None:
    cuda = state.torch.cuda
    if cuda.is_initialized():
        cuda.synchronize()
    if state.history is not None:
        state.history.step_ended()
    now_s = time.perf_counter()
    report.setdefault("step_times_s", []).append(now_s - state.began_s)
    report.setdefault("retries", []).append(_retries(cuda))
    report.update(steps=report["steps"] + 1, ranks=_ranks(state.torch), **measure())
    state.began_s, state.refusals = now_s, 0
    trial.write()


def _finish() -> NoReturn:
    """Puts the measurement on disk and ends the command, again and again if the command goes on."""
    state, report = _training, trial.report
    assert state is not None
    if not report["done"]:
        if state.history is not None and report.get("device") == state.history.place:
            told = state.history.finish()
            trial.write_beside("history", told if state.request["records"] else None)
            if state.history.ran_out:
                report["caught"] = _REFUSED_BY_HOST
        report.update(done=True, samples=_samples(state.request["batch_size"]))
        trial.write()
        # A last look for garbage among all that torch has made would take half a second; what this run has made is
        # thrown away, and a process that goes on is ended.
        gc.freeze()
    raise SystemExit(0)


def _retries(cuda: Any) -> int | None:
    if not cuda.is_initialized():
        return None
    return sum(int(cuda.memory_stats(index).get("num_alloc_retries", 0)) for index in range(cuda.device_count()))


def _ranks(torch: Any) -> int:
    """Processes that train together on this machine, this one included."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdigit():
        return int(local)
    distributed = torch.distributed
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


def measure() -> dict[str, Any]:
    """Peaks since the process began; on the host since its first forward pass. In bytes."""
    state = _training
    if state is None:
        return {}
    cuda = state.torch.cuda
    if cuda.is_initialized():
        index = max(range(cuda.device_count()), key=cuda.max_memory_reserved)
        if cuda.max_memory_reserved(index):
            free_bytes, total_bytes = cuda.mem_get_info(index)
            return {
                "device": f"cuda:{index}",
                "peak_allocated_bytes": cuda.max_memory_allocated(index),
                "peak_reserved_bytes": cuda.max_memory_reserved(index),
                "device_used_bytes": total_bytes - free_bytes,
                "fraction": cuda.get_per_process_memory_fraction(index),
            }
    process = trial.load("device/process")
    resident_bytes, idle_bytes = process.peak_resident_bytes(), state.idle_resident_bytes
    known = resident_bytes > state.old_peak_bytes and idle_bytes is not None  # zero: a system that keeps no such mark
    data_bytes = process.peak_data_bytes(above_space_bytes=state.old_space_bytes) if state.idle_data_bytes else None
    return {
        "device": "cpu",
        "peak_allocated_bytes": max(0, resident_bytes - idle_bytes) if known else None,
        "peak_reserved_bytes": None if data_bytes is None else max(0, data_bytes - state.idle_data_bytes),
        "compare_peaks": state.has_holes,
    }


def _limit_host() -> None:
    """Lets private data grow by the limit above that of an idle process, as HostDevice does; once."""
    state = _training
    if state is None or state.torch.compiler.is_compiling():
        return
    state.remove_handles()
    if state.soft_limit_bytes is not None:
        return
    # Before the limit, for it takes memory of its own. It ends in the thread where it began, and must: a process that
    # ends with torch's profiler at work crashes.
    is_wanted = state.request["records"] or state.request["notices"]
    if is_wanted and threading.current_thread() is threading.main_thread():
        state.history = trial.load("device/host_history").begin(state.torch)
        if state.history is not None:
            atexit.register(_end_history, state.history)
    process = trial.load("device/process")
    data_bytes, state.idle_resident_bytes = process.idle_bytes()
    limit_bytes = state.request["limit_bytes"]
    holes_bytes = process.holes_bytes(limit_bytes)
    if not process.reset_resident_peak():
        # A peak of the imports hides a smaller one of the training, and what finds its place in the holes.
        state.old_peak_bytes, holes_bytes = process.peak_resident_bytes(), 0
    state.has_holes = holes_bytes > 0
    state.idle_data_bytes, state.old_space_bytes = data_bytes + holes_bytes, process.status_bytes().get("VmPeak", 0)
    users_bytes, data_bytes = process.soft_limit_bytes(), data_bytes + holes_bytes + limit_bytes
    state.soft_limit_bytes = process.limit_data(data_bytes if users_bytes is None else min(data_bytes, users_bytes))


def _end_history(history: Any) -> None:
    """At the end of the process, of which nothing is known yet if it has neither made its steps nor failed.

    What a fork has inherited is its parent's: it only ends it.
    """
    if _training is None or _training.history is not history:
        history.end()
    elif history.finish() is None and history.ran_out and not trial.report["done"]:
        lift_limit()
        _note_refusal(_REFUSED_BY_HOST)


def _note_refusal(error: str) -> None:
    """Puts on disk that there was no memory: a command that catches that may end without a word, or never."""
    state = _training
    assert state is not None
    state.out_of_memory, state.refusals = error, state.refusals + 1
    if state.refusals <= trial.MOST_REFUSALS and not trial.report["done"]:
        trial.report.update(refused=error, refusals=state.refusals)
        trial.write()


def lift_limit() -> None:
    state = _training
    if state is not None and state.soft_limit_bytes is not None:
        trial.load("device/process").limit_data(state.soft_limit_bytes)


def _notice_errors(torch: Any) -> None:
    """Sees each ``torch.OutOfMemoryError`` that reaches Python: only then is one made.

    Those that torch itself answers, such as a convolution plan's workspace that cannot be had, never do, although the
    allocator counts them.
    """
    make = torch.OutOfMemoryError.__init__

    def init(self: BaseException, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if _training is not None and not _is_benchmark():
            _note_refusal(trial.load("device/oom").first_line(self))

    torch.OutOfMemoryError.__init__ = init


def _is_benchmark() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(("torch.", "triton.")) and any(part in name for part in _BENCHMARKS):
            return True
        frame = frame.f_back
    return False


def _samples(batch_size: int) -> int | None:
    """The samples of the largest data set that is loaded in batches of ``batch_size``, a rank's share of it."""
    loaders = sys.modules.get("torch.utils.data")
    if loaders is None:
        return None
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, loaders.DataLoader)}
    counts = []
    for loader in (thing for thing in things if type(thing) in kinds):
        batches = loader.batch_sampler
        try:
            if getattr(batches, "batch_size", loader.batch_size) == batch_size:
                counts.append(len(getattr(batches, "sampler", loader.sampler)))
        except (AttributeError, TypeError):  # a stream of unknown length
            continue
    return max(counts, default=None)
