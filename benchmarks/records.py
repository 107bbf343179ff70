"""Files of results: where they lie, what they are called, and how they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def file_for(kind: str, known: Mapping[str, Any]) -> Path:
    """The file of ``kind`` for the GPU of an :func:`~benchmarks.measure.environment`, and for its being virtual."""
    title = re.sub(r"[^a-z0-9]+", "_", known["device"].lower()).strip("_")
    return RESULTS / f"{kind}_{title}{'_virtual' if known['virtual'] else ''}.json"


def as_text(results: Mapping[str, Any]) -> str:
    """``results`` as JSON with a line for each row, so that a change of one is a line of a diff."""
    parts = []
    for key, value in results.items():
        text = _lines(value) if isinstance(value, list) else json.dumps(value, indent=1)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def others_of(file: Path, are_kept: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows of ``file`` that are not about to be measured anew, each with the date when it was."""
    if not file.exists():
        return []
    results = json.loads(file.read_text())
    return [{"date": results["environment"]["date"], **row} for row in results["rows"] if are_kept(row)]


def _lines(rows: Sequence[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
