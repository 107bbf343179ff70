"""The same workloads through autobatch and through what else finds a batch size.

Once on virtual cards (``peers_virtual.json``: the cells of ``benchmarks/cells.py``, and how the number of trials grows
from 4 to 640 GiB; ``peers_tune.json``: in the trainers of other libraries), once on real host memory under a limit
(``peers_host.json``)::

    python -m benchmarks.peers virtual|growth|tune|host [--cells CELL ...] [--peers PEER ...] [--json FILE] [--table]

A cell has a process of its own, which has imported everything before any clock starts; each peer, and each training in
a fresh process, is a fork of it (``benchmarks/measure.py``). What a peer tries, how often it fails and how many samples
it trains is counted in its training loop, seconds are those of its call. autobatch's contain the start of a process
with all its imports, and the confirmation of its answer, whose samples are told apart. Training on in the same process
is the peer's own (a second ``train()`` or ``fit()``), in a fresh one it is the plain loop that *solid* is defined by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.device.host import CHILD_ENVIRONMENT
from autobatch.units import MIB
from autobatch.virtual.attach import environment as driver_environment
from autobatch.virtual.attach import temporary_state
from autobatch.virtual.catalog import find_card
from benchmarks import cells
from benchmarks.answers import truth
from benchmarks.measure import Place, environment, largest_surviving, measure
from benchmarks.records import RESULTS, as_text
from benchmarks.searches import ALL, PEERS, TUNERS, import_all
from benchmarks.tables import growth_table, table
from tests.workloads import host

ROOT = Path(__file__).parent.parent
HOST_LIMIT_BYTES = 128 * MIB
HOST_VARIABLES = {**CHILD_ENVIRONMENT, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core say nothing
CELL_WITHIN_S = 1800.0
_GROWTH_GB = (4, 8, 16, 32, 64, 128, 256, 640)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A set of measurements, and the part of a file that holds them."""

    cells: tuple[str, ...]
    peers: tuple[str, ...]
    file: str
    part: str = "rows"


KINDS = {
    "virtual": Kind(cells=tuple(cell.name for cell in cells.CELLS), peers=tuple(PEERS), file="peers_virtual.json"),
    "growth": Kind(
        cells=tuple(f"{model}-{gb}" for model in ("resnet50", "gpt2") for gb in _GROWTH_GB),
        peers=("autobatch", "autobatch exact", "doubling"),
        file="peers_virtual.json",
        part="growth",
    ),
    "tune": Kind(
        cells=("gpt2-40", "resnet50-24"),
        peers=(*TUNERS, "HF Trainer", "Lightning power", "Lightning binsearch", "accelerate"),
        file="peers_tune.json",
    ),
    "host": Kind(cells=("mlp", "convolutions", "attention"), peers=tuple(PEERS), file="peers_host.json"),
}


def cell_of(name: str) -> cells.Cell:
    """The cell called ``gpt2-640``: also one that is not among those with a known truth."""
    build, _, gb = name.rpartition("-")
    if build not in {cell.build.__name__ for cell in cells.CELLS} or not gb.isdigit():
        raise ValueError(f"no cell is called {name!r}: a model of benchmarks/cells.py and GiB, such as gpt2-40")
    return cells.Cell(build=getattr(cells, build), gb=int(gb))


def builder_of(kind: str, cell: str) -> Callable[..., Any]:
    """What builds the workload of ``cell``."""
    if kind != "host":
        return cell_of(cell).build
    if cell not in KINDS[kind].cells:
        raise ValueError(f"no workload of the host is called {cell!r}: {', '.join(KINDS[kind].cells)}")
    builder: Callable[..., Any] = getattr(host, cell)
    return builder


def rows_here(
    cell: str,
    build: Callable[..., Any],
    place: Place,
    peers: Sequence[str],
    *,
    solid: int | None = None,
    find_truth: bool = False,
) -> list[dict[str, Any]]:
    """One row for each peer, measured by forks of this process; the truth too, if it is to be found here."""
    takers = [name for name in peers if ALL[name].takes(build.__name__)]
    rows = [{"cell": cell, **measure(name, ALL[name], build, place)} for name in takers]
    return against(found_among(rows, build, place) if find_truth else solid, rows)


def found_among(rows: Sequence[Mapping[str, Any]], build: Callable[..., Any], place: Place) -> int:
    """The truth, looked for around the answers of ``rows``."""
    return largest_surviving(build, place, [row["answer"] for row in rows if row.get("answer")])


def against(solid: int | None, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with the truth, and their answers over it."""
    ratios = [round(row["answer"] / solid, 4) if solid and row.get("answer") else None for row in rows]
    return [{**row, "solid": solid, "ratio": ratio} for ratio, row in zip(ratios, rows, strict=True)]


def one(kind: str, cell: str, peers: Sequence[str]) -> dict[str, Any]:
    """The rows of one cell, measured in this process, whose card or malloc its starter has seen to."""
    import_all()
    place = Place(device="cpu", limit_bytes=HOST_LIMIT_BYTES) if kind == "host" else Place(device="cuda:0")
    solid = truth().get(cell, {}).get("solid")
    rows = rows_here(cell, builder_of(kind, cell), place, peers, solid=solid, find_truth=kind == "host")
    return {"rows": rows, "environment": environment(place)}


def elsewhere(kind: str, cell: str, peers: Sequence[str]) -> dict[str, Any]:
    """:func:`one` in a new process, which has the cell's card, or the malloc of a child with limited memory."""
    with contextlib.ExitStack() as stack:
        variables: Mapping[str, str] = HOST_VARIABLES
        if kind != "host":
            state = stack.enter_context(temporary_state([find_card(cell_of(cell).card)]))
            variables = driver_environment(state)
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", kind, "--one", "--cells", cell, "--peers", *peers],
            env={**os.environ, **variables},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=CELL_WITHIN_S,
            check=True,
        )
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def run(kind: str, file: Path, names: Sequence[str] = (), peers: Sequence[str] = ()) -> dict[str, Any]:
    """Measures cells and writes ``file`` after each. What it holds of other cells and peers is kept."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    part = KINDS[kind].part
    for name in names or KINDS[kind].cells:
        found = elsewhere(kind, name, peers or KINDS[kind].peers)
        done = {(row["peer"], row["cell"]) for row in found["rows"]}
        rows = [row for row in known.get(part, []) if (row["peer"], row["cell"]) not in done] + found["rows"]
        known = {**known, "environment": found["environment"], part: rows}
        file.write_text(as_text(known))
        print("\n".join(json.dumps(row) for row in found["rows"]), file=sys.stderr, flush=True)
    return known


def tables(results: Mapping[str, Any]) -> str:
    """What a file of results holds, as Markdown."""
    parts = [table(results["rows"])] if results.get("rows") else []
    return "\n\n".join([*parts, *([growth_table(results["growth"])] if results.get("growth") else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cells", nargs="+", default=[], metavar="CELL")
    parser.add_argument("--peers", nargs="+", default=[], choices=ALL, metavar="PEER")
    parser.add_argument("--json", type=Path, help="the file to write, and to add to (benchmarks/results/peers_*.json)")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = KINDS[options.kind]
    try:
        for name in options.cells:
            builder_of(options.kind, name)
    except ValueError as error:
        parser.error(str(error))
    file = options.json or RESULTS / kind.file
    if options.one:
        print(json.dumps(one(options.kind, options.cells[0], options.peers)))
    elif options.table:
        print(tables(json.loads(file.read_text())))
    else:
        print(tables(run(options.kind, file, options.cells, options.peers)))


if __name__ == "__main__":
    main()
