"""The largest batch as a virtual GPU answers it, as it is found on the GPU of this machine, and whether that lasts.

A cell is one of ``benchmarks/gpu.py``: a model, and GiB of reserved memory or ``full``. The virtual GPU has the
capability and the multiprocessors of the real one and as much memory as the cell (for ``full`` the whole card, with the
catalog's bytes outside the allocator); the search on the real GPU begins at its answer, as it does by default. Then the
answer trains for 50 steps in a fresh process, and 2 % more for 20::

    python -m benchmarks.largest [--cells CELL ...] [--at-once 4] [--json FILE]

Several cells share the GPU at once, as long as their memory fits beside one another: seconds are those of a busy GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from autobatch.device.local import resolve_local
from autobatch.probe.lock import HELD_VARIABLE, lock_path
from autobatch.units import GIB
from benchmarks.gpu import place_of
from benchmarks.measure import Place, Task, environment, forked
from benchmarks.peers import ROOT
from benchmarks.records import as_text, file_for, others_of
from benchmarks.searches import import_all

CELLS = (
    *(f"{model}-{gb}" for gb in (8, 16, 24, 40, 80) for model in ("resnet50", "gpt2")),
    "vit_b_16-24",
    "bert-24",
    "llama-24",
    "gpt2-full",
)
QUICK = ("resnet50-16", "vit_b_16-24", "gpt2-16")
"""For ``make gpu``: a minute or two, beside the twins on a GPU of 80 GB."""
EXACT: dict[str, Any] = {"multiple_of": 1, "headroom": 0.0, "cache": None}
STEPS_AFTER, STEPS_ABOVE = 50, 20
_WITHIN_S = 240.0
_DEVICE = "cuda:0"


def card_for(place: Place, known: dict[str, Any]) -> str:
    """What the virtual GPU is, from what :func:`about` told of the real one."""
    memory = (
        f"memory={known['total_bytes']}B" if place.limit_bytes is None else f"memory={place.limit_bytes}B,outside=0"
    )
    return f"{memory},capability={known['capability']},sms={known['multiprocessors']}"


def about() -> dict[str, Any]:
    """The GPU of this machine. To be asked in a fork: it makes a context."""
    device = resolve_local(_DEVICE)
    info, lock = device.info(), lock_path(device)
    return {
        "total_bytes": info.total_bytes,
        "free_bytes": info.free_bytes,
        "capability": info.capability,
        "multiprocessors": info.details["multiprocessors"],
        "lock": None if lock is None else str(lock),
    }


def one(cell: str, known: dict[str, Any]) -> dict[str, Any]:
    """The row of ``cell``, each part in a fork of this process."""
    import_all()
    build, place = place_of(cell)
    card = card_for(place, known)
    virtual = forked(lambda: _search(build, device=card), _WITHIN_S)
    first = {"first_guess": virtual["answer"]} if "answer" in virtual else {}
    real = forked(lambda: _search(build, device=_DEVICE, memory_limit=place.limit_bytes, **first), _WITHIN_S)
    row: dict[str, Any] = {"cell": cell, "card": card, "virtual": virtual, "real": real}
    if "answer" in real:
        answer = real["answer"]
        row["over_virtual"] = round(answer / virtual["answer"], 4) if "answer" in virtual else None
        row["after"] = forked(lambda: _train(build, place, answer, STEPS_AFTER), _WITHIN_S)
        more = max(answer + 1, round(1.02 * answer))
        row["above"] = forked(lambda: _train(build, place, more, STEPS_ABOVE), _WITHIN_S)
    return row


def _search(build: Callable[..., Any], **options: Any) -> dict[str, Any]:
    import autobatch

    started_s = time.monotonic()
    result = autobatch.find(build, **EXACT, **options)
    return {
        "answer": result.batch_size,
        "trials": result.trial_count,
        "failures": result.oom_count,
        "asked": [f"{t.batch_size}{'' if t.fits else 'x'}" for t in (*result.trials, *result.confirmation)],
        "budget_bytes": result.budget_bytes,
        "notes": list(result.notes),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _train(build: Callable[..., Any], place: Place, size: int, steps: int) -> dict[str, Any]:
    """Plain training in this process: whether it lasts, and how often the allocator had to start over."""
    import torch

    from autobatch.device.oom import is_oom

    task, started_s = Task(build=build, place=place), time.monotonic()
    with task.device.restrict(None):
        try:
            task.train(size, steps)
            survives = True
        except Exception as exc:
            if not is_oom(exc):
                raise
            survives = False
        stats = torch.cuda.memory_stats()
        return {
            "size": size,
            "survives": survives,
            "steps": task.attempts[-1][1],
            "retries": stats["num_alloc_retries"],
            "peak_allocated_bytes": stats["allocated_bytes.all.peak"],
            "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
            "seconds": round(time.monotonic() - started_s, 1),
        }


def elsewhere(cell: str, known: dict[str, Any]) -> dict[str, Any]:
    """:func:`one` in a new process. Its searches do not wait for those beside it: each has a limit of its own."""
    command = [sys.executable, "-m", "benchmarks.largest", "--cells", cell, "--one", json.dumps(known)]
    variables = {HELD_VARIABLE: known["lock"]} if known["lock"] else {}
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=4 * _WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return {"cell": cell, "error": f"not done after {late.timeout:.0f} s"}
    if done.returncode != 0:
        return {"cell": cell, "error": done.stderr.strip()[-300:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run(names: Sequence[str], at_once: int, file: Path | None = None) -> dict[str, Any]:
    """Measures the cells that this GPU has the memory for, and writes the file after each: others in it are kept."""
    here, known, lock = environment(Place(device=_DEVICE)), forked(about), threading.Lock()
    file, memory = file or file_for("largest", here), Shared(known["free_bytes"])
    results = {"environment": here, "rows": others_of(file, lambda row: row["cell"] not in names)}

    def measure(cell: str) -> None:
        limit_bytes = place_of(cell)[1].limit_bytes
        with memory.part(known["free_bytes"] if limit_bytes is None else limit_bytes + GIB):
            row = elsewhere(cell, known)
        with lock:
            results["rows"].append(row)
            results["rows"].sort(key=lambda row: place_in_order(row["cell"]))
            file.write_text(as_text(results))
            print(json.dumps(row), file=sys.stderr, flush=True)

    fitting = [cell for cell in names if (place_of(cell)[1].limit_bytes or 0) + GIB <= known["free_bytes"]]
    if left_out := [cell for cell in names if cell not in fitting]:
        print(f"{', '.join(left_out)}: left out, the GPU has {known['free_bytes']} bytes free", file=sys.stderr)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(measure, fitting))
    return results


def place_in_order(cell: str) -> tuple[int, str]:
    """Those of :data:`CELLS` first, as they are there."""
    return CELLS.index(cell) if cell in CELLS else len(CELLS), cell


class Shared:
    """Memory that cells take for as long as they run, and wait for."""

    def __init__(self, size_bytes: int) -> None:
        self._free_bytes, self._changed = size_bytes, threading.Condition()

    @contextlib.contextmanager
    def part(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= size_bytes)
            self._free_bytes -= size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += size_bytes
                self._changed.notify_all()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each cell."""
    lines = [
        "| cell | virtual | found | found / virtual | trials / failures | 50 steps after | retries | 2 % more |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "after" not in row:
            told = row.get("error") or row["real"].get("error")
            lines.append(f"| {row['cell']} | {row.get('virtual', {}).get('answer')} | {told} | | | | | |")
            continue
        real, after, above = row["real"], row["after"], row["above"]
        cells = (
            row["cell"],
            row["virtual"].get("answer"),
            real["answer"],
            row["over_virtual"],
            f"{real['trials']} / {real['failures']}",
            "survive" if after.get("survives") else after.get("error", "run out"),
            after.get("retries"),
            "survives too" if above.get("survives") else above.get("error", "runs out"),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="CELL")
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--at-once", type=int, default=4, help="cells that share the GPU (4)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        for name in options.cells:
            place_of(name)
    except ValueError as error:
        parser.error(str(error))
    if options.one is not None:
        print(json.dumps(one(options.cells[0], options.one)))
    else:
        print(table(run(QUICK if options.quick else options.cells, options.at_once, options.json)["rows"]))


if __name__ == "__main__":
    main()
