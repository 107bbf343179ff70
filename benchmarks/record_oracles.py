"""Records what the cells answer to the search, for replay without a GPU (``tests/data/oracles_cells.json``).

For each cell and each setting, with the whole card and with 5 % of it withheld: trials as the finder runs them, and
whether the sizes near the edge pass the finder's confirmation. A row of ``trials`` is a size with its peak allocated
and reserved bytes and whether it thrashed, or the size alone where memory ran out; ``confirmed`` has the size and a
truth value. A cell takes minutes; what was recorded before is kept::

    python -m benchmarks.record_oracles FILE [CELL ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from autobatch.probe.inquiry import CONFIRM_STEPS
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.search.rounding import Rounding
from autobatch.probe.trial import TrialRequest
from autobatch.result import Outcome
from autobatch.virtual.resolve import resolve_device
from benchmarks.cells import CELLS, Cell

SETTINGS: dict[str, tuple[int | str, float]] = {"defaults": ("auto", 0.05), "exact": (1, 0.0)}
_GROWTH = 1.2  # from one size to the next, below the edge
_NEAR = 0.88  # of the edge: from here on the sizes are dense,
_DENSE = 12  # but about so many
_BEYOND = 3  # sizes tried beyond the edge
_PASSES = 3  # confirmations in a row after which smaller sizes are taken to pass
_STEPS = 3


class Recorder:
    """One cell under one limit."""

    def __init__(self, executor: ChildExecutor, limit_bytes: int | None) -> None:
        self._executor, self._limit_bytes = executor, limit_bytes
        self.trials: dict[int, list[Any]] = {}
        self.confirmed: dict[int, list[Any]] = {}

    def ask(self, size: int) -> bool:
        """Runs a trial of ``size``, once; True if it fits."""
        if size not in self.trials:
            trial = self._executor.run(self._request(size, _STEPS)).trial
            row: list[Any] = [size]
            if trial.measurement is not None and trial.outcome in (Outcome.FITS, Outcome.THRASHED):
                measured = trial.measurement
                row += [measured.peak_allocated_bytes, measured.peak_reserved_bytes, not trial.fits]
            self.trials[size] = row
        return self.trials[size][-1] is False

    def confirm(self, size: int) -> bool:
        """Confirms ``size`` as the finder does."""
        fresh = self._request(size, CONFIRM_STEPS)
        after_small = self._request(size, CONFIRM_STEPS, (1, 1))
        kept = all(attempt.trial.fits for attempt in self._executor.confirm((fresh, after_small)))
        self.confirmed[size] = [size, kept]
        return kept

    def _request(self, size: int, steps: int, before: tuple[int, ...] = ()) -> TrialRequest:
        return TrialRequest(batch_size=size, steps=steps, limit_bytes=self._limit_bytes, sizes_before=before)


def _around(recorder: Recorder, rounding: Rounding, edge: int) -> None:
    """Trials around the rank ``edge``, then confirmations downwards until they keep passing."""
    first = max(1, rounding.rank(int(_NEAR * rounding.size(edge))))
    stride = max(1, (edge - first) // _DENSE)
    ranks = range(edge - (edge - first) // stride * stride, edge + _BEYOND * stride + 1, stride)
    fitting = [rounding.size(rank) for rank in ranks if recorder.ask(rounding.size(rank))]
    passed = 0
    while fitting and passed < _PASSES:
        passed = passed + 1 if recorder.confirm(fitting.pop()) else 0
    _where_confirmations_end(recorder, rounding)


def _where_confirmations_end(recorder: Recorder, rounding: Rounding) -> None:
    """Bisects between the largest size that is confirmed and the next one known not to be."""
    low = max((rounding.rank(size) for size, kept in recorder.confirmed.values() if kept), default=0)
    refused = [rounding.rank(size) for size, kept in recorder.confirmed.values() if not kept]
    unfit = [rounding.rank(size) for size, row in recorder.trials.items() if row[-1] is not False]
    high = min(rank for rank in [*refused, *unfit] if rank > low)
    while high - low > 1:
        middle = (low + high) // 2
        kept = recorder.ask(rounding.size(middle)) and recorder.confirm(rounding.size(middle))
        low, high = (middle, high) if kept else (low, middle)


def _growing() -> Iterator[int]:
    size = 1
    while True:
        yield size
        size = max(size + 1, int(size * _GROWTH))


def record(cell: Cell, multiple_of: int | str, headroom: float) -> dict[str, Any]:
    """Trials and confirmations of ``cell``: sparse from one sample on, dense near the edge."""
    device = resolve_device(cell.card)  # as long as it is there, so is the card
    capacity_bytes = int(cell.gb * 2**30 * (1 - headroom))
    with closing(ChildExecutor(cell.build, device.isolation())) as executor:
        recorder = Recorder(executor, capacity_bytes if headroom else None)
        next(size for size in _growing() if not recorder.ask(size))
        rounding = Rounding(multiple_of)
        low, high = (rounding.rank(size) for size in sorted(recorder.trials)[-2:])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if recorder.ask(rounding.size(middle)) else (low, middle)
        _around(recorder, rounding, low)
    return {
        "capacity_bytes": capacity_bytes,
        "trials": [recorder.trials[size] for size in sorted(recorder.trials)],
        "confirmed": [recorder.confirmed[size] for size in sorted(recorder.confirmed)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("cells", nargs="*", choices=[[], *(cell.name for cell in CELLS)], metavar="CELL")
    options = parser.parse_args()
    known = json.loads(options.file.read_text()) if options.file.exists() else {"cells": {}}
    known["torch"] = str(torch.__version__)
    for setting, (multiple_of, headroom) in SETTINGS.items():
        for cell in CELLS:
            if not options.cells or cell.name in options.cells:
                known["cells"].setdefault(cell.name, {})[setting] = record(cell, multiple_of, headroom)
                options.file.write_text(json.dumps(known, separators=(",", ":")).replace('"exact"', '\n"exact"') + "\n")
                print(cell.name, setting, flush=True)


if __name__ == "__main__":
    main()
