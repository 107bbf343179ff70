"""The peers on the GPU of this machine, whole and under fractions of its memory (``results/gpu_<device>.json``).

A cell is a model of ``benchmarks/cells.py`` and what it may have: ``gpt2-16`` (GiB of reserved memory, by
``torch.cuda.set_per_process_memory_fraction`` or, for autobatch, ``memory_limit``) or ``gpt2-full``. The truth is the
largest size that survives 20 steps in a fresh process, bisected around the answers, which takes longer than all else::

    python -m benchmarks.gpu [--cells CELL ...] [--peers PEER ...] [--no-truth] [--json FILE]

It runs as well on a GPU that is not there: ``autobatch run --gpu a100-40gb -- python -m benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autobatch.units import GIB
from benchmarks import cells
from benchmarks.measure import Place, environment, forked
from benchmarks.peers import against, found_among, rows_here
from benchmarks.records import as_text, file_for, others_of
from benchmarks.searches import PEERS, import_all
from benchmarks.tables import table

CELLS = ("gpt2-16", "gpt2-full", "resnet50-16", "resnet50-40", "resnet50-full")
QUICK = ("resnet50-16",)
"""For ``make gpu``: a minute."""
QUICK_PEERS = ("autobatch", "autobatch live", "Lightning binsearch", "accelerate", "doubling")
_DEVICE = "cuda:0"
_BUILDS = {cell.build.__name__: cell.build for cell in cells.CELLS}


def place_of(name: str) -> tuple[Callable[..., Any], Place]:
    """The model and the limit of the cell called ``name``."""
    model, _, size = name.rpartition("-")
    if model not in _BUILDS or not re.fullmatch(r"full|[1-9]\d*", size):
        raise ValueError(f"no cell is called {name!r}: one of {', '.join(_BUILDS)}, then -full or GiB, as in gpt2-16")
    return _BUILDS[model], Place(device=_DEVICE, limit_bytes=None if size == "full" else int(size) * GIB)


def run(names: Sequence[str], peers: Sequence[str], file: Path | None = None, *, truth: bool = True) -> dict[str, Any]:
    """The rows of every cell that this GPU has the memory for, and the environment; in ``file`` as they come.

    What is there of other cells and other peers stays behind them, with the date of its own.
    """
    import_all()
    whole = Place(device=_DEVICE)
    known = environment(whole)
    free_bytes = forked(lambda: {"free": whole.open().budget_bytes()})["free"]
    file = file or file_for("gpu", known)
    kept = others_of(file, lambda row: row["cell"] not in names or row["peer"] not in peers)
    results: dict[str, Any] = {"environment": known, "rows": kept}
    measured = list[dict[str, Any]]()
    for name in names:
        build, place = place_of(name)
        if place.limit_bytes is not None and place.limit_bytes > free_bytes:
            print(f"{name}: left out, the GPU has {free_bytes} bytes free", file=sys.stderr)
            continue
        rows = list[dict[str, Any]]()
        for peer in peers:
            found = rows_here(name, build, place, [peer])
            rows += found
            results["rows"] = measured + rows + kept
            file.write_text(as_text(results))
            print("\n".join(json.dumps(row) for row in found), file=sys.stderr, flush=True)
        measured += against(found_among(rows, build, place), rows) if truth else rows
        results["rows"] = measured + kept
        file.write_text(as_text(results))
    print(f"written: {file}", file=sys.stderr)
    return results | {"rows": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="CELL")
    parser.add_argument("--peers", nargs="+", default=(), choices=PEERS, metavar="PEER")
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)}, {len(QUICK_PEERS)} peers, answers only"
    )
    parser.add_argument("--no-truth", action="store_true", help="answers only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = QUICK if options.quick else options.cells
    try:
        for name in names:
            place_of(name)
    except ValueError as error:
        parser.error(str(error))
    peers = options.peers or (QUICK_PEERS if options.quick else tuple(PEERS))
    print(table(run(names, peers, options.json, truth=not (options.no_truth or options.quick))["rows"]))


if __name__ == "__main__":
    main()
