"""Samples per second over the batch size, and step times of Accumulator and Trainer, on the GPU of this machine.

For each model sizes double to the first that does not fit; a size's time is the median of its steps after two that do
not count, each waited for. Beside that ``benchmarks/training.py``, on the GPU::

    python -m benchmarks.throughput [--models MODEL ...] [--rounds 10] [--json FILE]

A virtual GPU has no times: this refuses one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cells, training
from benchmarks.measure import Place, Task, environment, forked, is_virtual
from benchmarks.records import as_text, file_for
from benchmarks.searches import import_all

DEVICE = "cuda:0"
MODELS = ("resnet50", "gpt2")
_STEPS, _WARM_UP = 7, 2
_LARGEST = 1024


def over_sizes(model: str) -> dict[str, Any]:
    """Samples per second and reserved bytes of each size, in this process."""
    import torch

    from autobatch.device.oom import is_oom

    task = Task(build=getattr(cells, model), place=Place(device=DEVICE))
    rows: list[dict[str, Any]] = []
    for size in itertools.takewhile(lambda size: size <= _LARGEST, (1 << power for power in itertools.count())):
        try:
            step_s = statistics.median(step_times(task, size)[_WARM_UP:])
        except Exception as exc:
            if not is_oom(exc):
                raise
            break
        reserved_bytes = torch.cuda.max_memory_reserved()
        task.clean_up()
        torch.cuda.reset_peak_memory_stats()
        rows.append(
            {
                "batch_size": size,
                "step_s": round(step_s, 5),
                "samples_per_s": round(size / step_s, 1),
                "peak_reserved_bytes": reserved_bytes,
            }
        )
    return {"rows": rows}


def step_times(task: Task, size: int) -> list[float]:
    """Seconds of each step, from the end of the one before."""
    times, workload = [], task.workload
    task.device.synchronize()
    try:
        for _ in range(_STEPS + _WARM_UP):
            started_s = time.perf_counter()
            workload.train_step(size)
            task.device.synchronize()
            times.append(time.perf_counter() - started_s)
    finally:
        workload.forget()
    return times


def run(models: Sequence[str], rounds: int, file: Path | None = None) -> dict[str, Any]:
    """Measures, and writes the file after each part."""
    if is_virtual(Place(device=DEVICE)):
        raise SystemExit("a virtual GPU has no times: this needs a real one")
    import_all()
    results: dict[str, Any] = {"environment": environment(Place(device=DEVICE))}
    file = file or file_for("throughput", results["environment"])
    results["rows"] = []
    for model in models:
        found = forked(lambda model=model: over_sizes(model))  # type: ignore[misc]
        results["rows"] += [{"model": model, **row} for row in found.get("rows", [found])]
        file.write_text(as_text(results))
        print(json.dumps(results["rows"][-1]), file=sys.stderr, flush=True)
    found = forked(lambda: {"training": training.run(rounds, DEVICE)})
    results |= {"rounds": rounds, "training": found.get("training", [found])}
    file.write_text(as_text(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = run(options.models, options.rounds, options.json)
    for row in results["rows"]:
        print(json.dumps(row))
    print(training.table(results["training"]) if "error" not in results["training"][0] else results["training"])


if __name__ == "__main__":
    main()
