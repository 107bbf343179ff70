"""Virtual against real: the same training steps on this machine's GPU and on its virtual twin, at the same time.

Each side is a process of its own (``benchmarks/twin_sides.py``) that runs the cases of ``benchmarks/twin_cases.py`` and
records what torch's allocator holds after each step and all that it did. A line for each case as soon as both sides
have it, a table in the end, and ``results/twins_<device>.json``::

    python -m benchmarks.twins [--cases CASE ...] [--workers 7] [--within 150] [--json FILE] [--records FOLDER]

``--records`` keeps both histories. What the folder holds already is not run again: with the records of a GPU in it,
the virtual side can be run anew where there is none.

What depends neither on values nor on times must be equal. ``cudnn.benchmark`` times convolutions and ``torch.compile``
its kernels, in their first step, which a virtual GPU cannot. It runs as well where a virtual GPU stands in for the real
one, and has a twin of its own then: ``autobatch run --gpu h200 -- python -m benchmarks.twins``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autobatch.hook import REPORTS_VARIABLE
from autobatch.virtual.attach import environment as driver_environment
from autobatch.virtual.attach import temporary_state
from autobatch.virtual.catalog import Card
from benchmarks.measure import Place, environment, forked
from benchmarks.peers import ROOT
from benchmarks.records import as_text, file_for
from benchmarks.twin_cases import CASES, Case
from benchmarks.twin_sides import SIDES, file_of, read

WITHIN_S = 150.0
DEADLINE_S = 100.0
_POLL_S = 0.05
_SETTINGS = {  # of both sides: one way through torch whatever the user has set, and no process outlives its starter
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # an import that asks whether there is a GPU leaves forks able to use it
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCH_SYMBOLIZE_MODE": "dladdr",  # names without lines, in a fraction of a second
    "HF_HUB_OFFLINE": "1",
}
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_DROPPED = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", REPORTS_VARIABLE}
_OF_THE_REAL_GPU = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"}  # the twin is alone on its machine
_COLUMNS = ("case", "allocator", "allocated, virtual / real", "reserved, virtual / real", "first event that differs")

Record = Mapping[str, Any]
"""What :func:`benchmarks.twin_sides.record` returns, or only its ``error``."""
Side = subprocess.Popen[bytes]


def compare(case: Case, real: Record, virtual: Record) -> dict[str, Any]:
    """The row of a case. ``worst_*`` is the ``virtual / real - 1`` of a step that is furthest from zero.

    ``steps`` has the figures of a step once where they are equal, else the real ones and the virtual ones.
    """
    sides = dict(zip(SIDES, (real, virtual), strict=True))
    errors = {side: found["error"] for side, found in sides.items() if found.get("error")}
    left, right = (found.get("steps", []) for found in sides.values())
    pairs = list(zip(left, right, strict=False))
    return {
        "case": case.workload,
        "allocator": case.allocator,
        "equal": bool(left) and left == right and not errors,
        "worst_allocated": _worst([(a[0], b[0]) for a, b in pairs]),
        "worst_reserved": _worst([(a[1], b[1]) for a, b in pairs]),
        "events": [len(found.get("events", [])) for found in sides.values()],
        "allocations": [found["marks"][-1] if found.get("marks") else None for found in sides.values()],
        "first_difference": first_difference(real, virtual),
        "outside_bytes": [found.get("outside_bytes") for found in sides.values()],
        "seconds": [found.get("seconds") for found in sides.values()],
        "error": errors or None,
        "steps": [[a] if a == b else [a, b] for a, b in pairs],
    }


def first_difference(real: Record, virtual: Record) -> dict[str, Any] | None:
    """The first event that has another action or size than its counterpart, or has none, and all ``steps`` with one.

    Step 0 is the building. None if all agree, or where a side has no history.
    """
    left, right = events_of(real), events_of(virtual)
    if not left or not right or _sizes(left) == _sizes(right):
        return None
    differing = (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a[:2] != b[:2])
    at = next(differing, min(len(left), len(right)))
    by_step = itertools.zip_longest(_steps_of(left, real["marks"]), _steps_of(right, virtual["marks"]))
    steps = [step for step, (a, b) in enumerate(by_step) if a != b]
    return {"event": at, "steps": steps, "real": _told(left, at), "virtual": _told(right, at)}


def events_of(found: Record) -> list[list[Any]]:
    """The events with their places. Frees in a row come by size: their order leaves no trace in the allocator, and
    autocast lets go of its copies in an order of their addresses, another one in each process.
    """
    events = [[action, size, found["places"][place]] for action, size, place in found.get("events", [])]
    groups = itertools.groupby(events, key=lambda event: event[0] == "free_completed")
    return [event for frees, group in groups for event in (sorted(group) if frees else group)]


def _sizes(events: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    return [event[:2] for event in events]


def _steps_of(events: Sequence[Sequence[Any]], marks: Sequence[int]) -> list[list[Sequence[Any]]]:
    """Actions and sizes, a list for each step. What is freed after the last allocation of a step is part of it."""
    steps: list[list[Sequence[Any]]] = [[]]
    allocations = 0
    for event in events:
        allocations += event[0] == "alloc"
        while len(steps) <= len(marks) and allocations > marks[len(steps) - 1]:
            steps.append([])
        steps[-1].append(event[:2])
    return steps


def _told(events: Sequence[Sequence[Any]], at: int) -> dict[str, Any] | None:
    return dict(zip(("action", "size_bytes", "place"), events[at], strict=True)) if at < len(events) else None


def _worst(pairs: Sequence[tuple[int, int]]) -> float | None:
    ratios = [round(virtual / real - 1, 6) for real, virtual in pairs if real]
    return max(ratios, key=abs, default=None)


# ---- for people


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each case, in Markdown."""
    return "\n".join(map(_line, (_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, rows))))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    worst = (_percent(row["worst_allocated"]), _percent(row["worst_reserved"]))
    return (row["case"], row["allocator"], *worst, _brief(row))


def _percent(worst: float | None) -> str:
    if worst is None:
        return "-"
    return f"{100 * worst:+.2f} %" if worst else "equal"


def _brief(row: Mapping[str, Any]) -> str:
    errors = "".join(f"; {side}: {text}" for side, text in (row["error"] or {}).items())
    count, found = row["events"][0], row["first_difference"]
    if found is None or (errors and None in (found["real"], found["virtual"])):
        return errors[2:] or f"none of {count}"
    events = " / ".join(f"{told['action']} {told['size_bytes']}" if (told := found[side]) else "-" for side in SIDES)
    place = (found["real"] or found["virtual"])["place"]
    steps = ", ".join(map(str, found["steps"]))
    return f"{found['event']} of {count}: {events} ({place}), in steps {steps}{errors}"


# ---- the starter of both sides, which keeps off the GPU itself


def card_here() -> dict[str, Any]:
    """The figures of the first GPU, as torch tells them. For a process of its own."""
    import torch

    known = torch.cuda.get_device_properties(0)
    return {
        "title": known.name,
        "total_bytes": known.total_memory,
        "capability": (known.major, known.minor),
        "multiprocessors": known.multi_processor_count,
    }


def twin(known: Mapping[str, Any]) -> Card:
    """The card of these figures. Nothing stands beside its allocator: no case comes near the end of its memory."""
    figures = {**known, "capability": tuple(known["capability"])}
    return Card(name="twin", outside_bytes=0, sources=dict.fromkeys(known, "the real GPU"), **figures)


def _noted(file: Path, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``ask`` finds out, or found out when ``file`` was written."""
    if not file.exists():
        found = ask()
        if "error" in found:
            raise SystemExit(f"no GPU here: {found['error']}")
        file.write_text(json.dumps(found))
    known: dict[str, Any] = json.loads(file.read_text())
    return known


@contextlib.contextmanager
def side(name: str, folder: Path, arguments: Sequence[str], state: Path | None = None) -> Iterator[Side]:
    """The process of a side, on the virtual GPU of ``state`` if given, and killed on leaving with all its forks."""
    dropped = _DROPPED | (_OF_THE_REAL_GPU if state else set())
    base = {key: value for key, value in os.environ.items() if key not in dropped} | _SETTINGS
    driver = driver_environment(state, base) if state else {}
    command = [sys.executable, "-m", "benchmarks.twin_sides", name, str(folder), "--starter", str(os.getpid())]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        process = subprocess.Popen(
            [*command, *arguments],
            env={**base, **driver, **{variable: str(Path(caches, variable)) for variable in _CACHES}},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rows_of(folder: Path, names: Sequence[str], processes: Sequence[Side], until_s: float) -> Iterator[dict[str, Any]]:
    """The row of each case as soon as both sides have recorded it; in the end what is known of the others."""
    pending = list(names)
    while pending:
        codes = [process.poll() for process in processes]
        over = time.monotonic() > until_s or any(codes) or None not in codes
        for name in list(pending):
            files = [file_of(folder, of, name) for of in SIDES]
            if over or all(file.exists() for file in files):
                pending.remove(name)
                yield compare(CASES[name], *map(read, files))
        time.sleep(_POLL_S)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs both sides and writes the file of results after each case."""
    until_s = time.monotonic() + options.within
    names = list(dict.fromkeys(options.cases))
    arguments = ["--workers", str(options.workers), "--deadline", str(options.deadline), "--cases", *names]
    with contextlib.ExitStack() as stack:
        real = stack.enter_context(side("real", folder, arguments))
        card = twin(_noted(folder / "card.json", lambda: forked(card_here)))
        state = stack.enter_context(temporary_state([card]))
        virtual = stack.enter_context(side("virtual", folder, arguments, state))
        known = _noted(folder / "environment.json", lambda: environment(Place(device="cuda:0")))
        file = options.json or file_for("twins", known)
        rows: dict[str, dict[str, Any]] = {}
        for row in rows_of(folder, names, (real, virtual), until_s):
            rows[f"{row['case']} {row['allocator']}"] = row
            results = {"environment": known, "rows": list(rows.values())}
            file.write_text(as_text(results))
            print(_line(_cells(row)), file=sys.stderr, flush=True)
    print(f"written: {file}", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--workers", type=int, default=7, help="cases at a time, on each side")
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds for the whole")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for a case")
    parser.add_argument("--json", type=Path, help="the file to write (benchmarks/results/twins_<device>.json)")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="keep both sides' histories there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (options.records or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        results = run(options, folder)
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
