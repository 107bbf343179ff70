"""What really fits: *solid* and *top* of a cell, found without the search.

*Solid* is the largest n such that every size from 0.85 n to n, in steps of n/200 where that is more than one, survives
20 steps (a) in a fresh process, (b) after two steps of one sample, (c) after one failed attempt at 1.5 n. *Top* is the
largest size that survives any of the three. Each run is a fork of this process, which has imported everything and
touched no device::

    autobatch run --gpu CARD -- python -m benchmarks.truth CELL
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.cells import CELLS, Cell

HISTORIES = ("fresh", "small", "failed")
STEPS = 20
_ABOVE = 1.06  # how far above the plain edge sizes are looked at for top
_SOLID_FROM = 0.85


class Truth:
    """Asks whether sizes survive, each question at most once."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._known: dict[tuple[int, str], bool] = {}

    def survives(self, size: int, history: str) -> bool:
        key = (size, history)
        if key not in self._known:
            self._known[key] = _forked(lambda: _run(self._build, size, history))
        return self._known[key]

    def edge(self) -> int:
        """A size that survives a fresh process while the next does not."""
        low, high = 0, 1
        while self.survives(high, "fresh"):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.survives(middle, "fresh") else (low, middle)
        return low

    def top(self, edge: int) -> int:
        size = int(edge * _ABOVE) + 2
        while not any(self.survives(size, history) for history in HISTORIES):
            size -= 1
        return size

    def solid(self, top: int) -> int:
        size = top
        while size:
            failure = next((s for s in _grid(size) if not all(self.survives(s, h) for h in HISTORIES)), None)
            if failure is None:
                return size
            size = failure - 1
        return 0


def _grid(size: int) -> list[int]:
    """Sizes from ``size`` down to 0.85 of it."""
    stride = max(1.0, size / 200)
    count = int((1 - _SOLID_FROM) * size / stride)
    return sorted({round(size - k * stride) for k in range(count + 1)}, reverse=True)


def _run(build: Callable[..., Any], size: int, history: str) -> None:
    import torch

    workload = build("cuda:0")
    if history == "small":
        workload.train_step(1)
        workload.train_step(1)
    elif history == "failed":
        with contextlib.suppress(torch.OutOfMemoryError):
            workload.train_step(size + size // 2)
        workload.forget()
        gc.collect()
        torch.cuda.empty_cache()
    for _ in range(STEPS):
        workload.train_step(size)


def _forked(run: Callable[[], None]) -> bool:
    """True if ``run`` ends, False if it runs out of memory, in a process of its own."""
    import torch

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        except torch.OutOfMemoryError:
            status = 3
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, 3):
        raise RuntimeError(f"a run ended with {status}")
    return status == 0


def measure(cell: Cell) -> dict[str, Any]:
    """Solid and top of ``cell``, on the GPU of this process."""
    import torch

    truth = Truth(cell.build)
    edge = truth.edge()
    top = truth.top(edge)
    return {
        "cell": cell.name,
        "card": cell.card,
        "edge": edge,
        "top": top,
        "solid": truth.solid(top),
        "torch": torch.__version__,
        "virtual": True,
        "runs": len(truth._known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", choices=[cell.name for cell in CELLS])
    name = parser.parse_args().cell
    for module in ("torch._dynamo", "torchvision", "transformers"):
        __import__(module)
    print(json.dumps(measure(next(cell for cell in CELLS if cell.name == name))), flush=True)


if __name__ == "__main__":
    main()
