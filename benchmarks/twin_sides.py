"""One side of ``benchmarks/twins.py``: a process that imports everything, touches no GPU, and forks for each case.

A fork records what torch's allocator does in its case: what it holds after each step, and every event of its history.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autobatch.virtual.attach import present_state
from benchmarks.twin_cases import CASES, Case

SIDES = ("real", "virtual")
_IMPORTS = (  # not torch._inductor: in torch 2.11 it asks for the GPU, and then no fork can have it
    "torch._dynamo",
    "torchvision",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
_POLL_S = 0.05
_MOST_EVENTS = 2_000_000
_EVENTS = {"alloc", "free_completed", "oom", "segment_alloc", "segment_free", "segment_map", "segment_unmap"}
_FIGURES = (
    "allocated_bytes.all.peak",
    "reserved_bytes.all.peak",
    "allocated_bytes.all.current",
    "num_alloc_retries",
)
_OPERATOR = re.compile(r"at::_ops::(\w+)::")
_NODE = re.compile(r"torch::autograd::(?:generated::)?(\w+)::apply")
_CALLS = {"_call_impl", "_wrapped_call_impl"}
_PR_SET_PDEATHSIG = 1


def record(case: Case) -> dict[str, Any]:
    """What the allocator does in ``case``, up to its failure if it fails. For a process that has no CUDA context yet.

    ``steps`` begins with the building: bytes allocated and reserved at their peaks, bytes allocated at the end,
    retries so far. ``marks`` counts the allocations before the end of each. ``events`` are an action, bytes, and an
    index into ``places``.
    """
    started_s, error = time.monotonic(), None
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{case.expandable}")
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="all", max_entries=_MOST_EVENTS)
    torch.manual_seed(0)
    steps, marks = [], []
    try:
        for _ in case.run():
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            steps.append([stats[key] for key in _FIGURES])
            marks.append(stats["allocation.all.allocated"])
            torch.cuda.reset_peak_memory_stats()
    except Exception as exc:  # noqa: BLE001 - told in the row
        error = f"skipped: {exc}" if isinstance(exc, ImportError) else f"{type(exc).__name__}: {str(exc)[:300]}"
    seconds = round(time.monotonic() - started_s, 2)
    found = {"steps": steps, "marks": marks, "seconds": seconds, "error": error}
    return found | ({"outside_bytes": _outside_bytes(), **_history()} if torch.cuda.is_initialized() else {})


def _history() -> dict[str, Any]:
    places: dict[str, int] = {}
    events = [
        [event["action"], event["size"], places.setdefault(place_of(event.get("frames", ())), len(places))]
        for event in torch.cuda.memory._snapshot()["device_traces"][0]
        if event["action"] in _EVENTS
    ]
    return {"events": events, "places": list(places)}


def place_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """Where an event comes from, innermost first: torch's operators, the node of the backward pass, lines of Python."""
    operators = dict.fromkeys(match[1] for frame in frames if (match := _OPERATOR.match(frame["name"])))
    nodes = [match[1] for frame in frames if (match := _NODE.search(frame["name"]))]
    lines = [frame for frame in frames if frame["filename"].endswith(".py") and frame["name"] not in _CALLS]
    beside = [frame for frame in lines[1:] if "/torch/" not in frame["filename"]]
    shown = [f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in (*lines[:1], *beside[:1])]
    return " < ".join([*list(operators)[:4], *nodes[:1], *shown])


def _outside_bytes() -> int | None:
    """What this process has of the GPU beside torch's allocator, in bytes; None where the driver does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [process for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except pynvml.NVMLError:
        return None
    used = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return used[0] - torch.cuda.memory_reserved() if len(used) == 1 and used[0] else None


# ---- all cases, a few at a time


def run(side: str, folder: Path, names: Sequence[str], *, workers: int, deadline_s: float) -> None:
    """Records each case that ``folder`` does not hold yet."""
    for module in _IMPORTS:
        __import__(module)
    waiting = [name for name in names if not file_of(folder, side, name).exists()]
    running: dict[int, tuple[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            running[_start(CASES[name], file_of(folder, side, name))] = (name, time.monotonic() + deadline_s)
        time.sleep(_POLL_S)
        for pid, (name, until_s) in list(running.items()):
            if (end := _end_of(pid, until_s)) is not None:
                del running[pid]
                file = file_of(folder, side, name)
                if not file.exists():
                    write(file, {"error": f"{end} {_last_line(_log_of(file))}".rstrip(": ")})


def _start(case: Case, file: Path) -> int:
    """The fork that records ``case``; what it prints goes to a file beside ``file``."""
    parent = os.getpid()
    if (pid := os.fork()) != 0:
        return pid
    try:
        die_with(parent)
        log = os.open(_log_of(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        write(file, record(case))
    except BaseException as exc:  # noqa: BLE001 - found there by the side
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
    os._exit(0)  # what the side has opened is the side's to close


def _end_of(pid: int, until_s: float) -> str | None:
    """How a fork ended, killed if it is late; None while it runs."""
    late = time.monotonic() > until_s
    if late:
        os.kill(pid, signal.SIGKILL)
    ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
    if not ended:
        return None
    return "not done in time:" if late else f"ended with {os.waitstatus_to_exitcode(status)}:"


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its starter, ``parent``, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that
        os._exit(1)


# ---- the files of a side


def file_of(folder: Path, side: str, name: str) -> Path:
    return folder / f"{side}-{name}.json.gz"


def _log_of(file: Path) -> Path:
    return file.with_name(file.name.removesuffix(".json.gz") + ".log")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line[:300] for line in reversed(lines) if line.strip()), "")


def write(file: Path, found: Mapping[str, Any]) -> None:
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_bytes(gzip.compress(json.dumps(found).encode(), 1))
    unfinished.replace(file)


def read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"error": "not done when the run ended"}
    found: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", required=True, choices=CASES)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds for a case")
    parser.add_argument("--starter", type=int, required=True, help="the process to die with")
    options = parser.parse_args()
    die_with(options.starter)
    if options.side == "virtual" and present_state() is None:
        raise SystemExit("the twin has no virtual GPU")
    run(options.side, options.folder, options.cases, workers=options.workers, deadline_s=options.deadline)


if __name__ == "__main__":
    main()
