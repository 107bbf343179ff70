"""What the search answers in every cell, held against the truth in ``tests/data/truth_cells.json``.

For each cell, with ``multiple_of=1`` and no headroom and with the defaults: trials, failures, the answer, the answer
over *solid*, and whether it survives 20 steps in a fresh process, after two steps of one sample, and after one failed
attempt (``benchmarks.truth``)::

    python -m benchmarks.answers [CELL ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import autobatch
from benchmarks.cells import CELLS, VARIABLE_CELLS, Cell

ALL = (*CELLS, *VARIABLE_CELLS)  # of those whose samples vary no truth is known
TRUTH = Path(__file__).parent.parent / "tests" / "data" / "truth_cells.json"
SETTINGS: dict[str, dict[str, Any]] = {"exact": {"multiple_of": 1, "headroom": 0.0}, "defaults": {}}


def truth() -> dict[str, Any]:
    """Solid and top of each cell, by its name."""
    cells: dict[str, Any] = json.loads(TRUTH.read_text())["cells"]
    return cells


def answer(cell: Cell, setting: str) -> dict[str, Any]:
    """One search in ``cell``."""
    started_s = time.monotonic()
    result = autobatch.find(cell.build, device=cell.card, **SETTINGS[setting])
    known = truth().get(cell.name, {})
    solid = known.get("solid")
    return {
        "cell": cell.name,
        "setting": setting,
        "answer": result.batch_size,
        "solid": solid,
        "top": known.get("top"),
        "ratio": None if solid is None else round(result.batch_size / solid, 4),
        "trials": result.trial_count,
        "failures": result.oom_count,
        "asked": [f"{t.batch_size}{'' if t.fits else 'x'}" for t in result.trials],
        "confirmed": [f"{t.batch_size}{'' if t.fits else 'x'} {t.history}" for t in result.confirmation],
        "duration_s": round(time.monotonic() - started_s, 1),
        "torch": result.environment["torch"],
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians and extremes, a line for each setting."""
    lines = []
    for setting in SETTINGS:
        of = [row for row in rows if row["setting"] == setting and row["solid"] is not None]
        if of:
            trials, failures, ratios = ([row[key] for row in of] for key in ("trials", "failures", "ratio"))
            lines.append(
                f"{setting}: {len(of)} cells, trials median {statistics.median(trials)} most {max(trials)}, failures "
                f"median {statistics.median(failures)} most {max(failures)}, "
                f"answer over solid {min(ratios)} to {max(ratios)}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[[], *(cell.name for cell in ALL)], metavar="CELL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for cell in ALL:
        if not options.cells or cell.name in options.cells:
            for setting in SETTINGS:
                rows.append(answer(cell, setting))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
