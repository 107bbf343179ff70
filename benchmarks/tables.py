"""The peers' rows as Markdown: medians over the cells in which they came to an answer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.searches import ALL

_HEAD = (
    "peer",
    "trials",
    "failures",
    "answer / solid",
    "samples / solid",
    "confirming / solid",
    "seconds",
    "of them confirming",
    "survives 20 steps: fresh",
    "same process",
    "state changed",
    "no answer",
)
_DIGITS = (1, 1, 2, 1, 1, 1, 1)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each peer, in Markdown: medians over the cells where it came to an answer."""
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for name in ALL:
        of = [row for row in rows if row["peer"] == name]
        if of:
            lines.append((name, *_summary(of)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    answered = [row for row in rows if row.get("answer")]
    if not answered:
        return ["-"] * 10 + [f"{len(rows)} of {len(rows)}"]
    columns = [[row[key] for row in answered] for key in ("trials", "failures", "ratio")]
    for key in ("samples", "samples_confirming"):
        columns.append([row[key] / row["solid"] for row in answered if row["solid"]])
    columns += [[row.get(key) for row in answered] for key in ("seconds", "seconds_confirming")]
    medians = [statistics.median(known) if (known := [x for x in of if x is not None]) else None for of in columns]
    texts = ["-" if x is None else f"{x:.{digits}f}" for x, digits in zip(medians, _DIGITS, strict=True)]
    counts = [sum(bool(row.get(key)) for row in answered) for key in ("survives_fresh", "survives_same", "changed")]
    return [*texts, *(f"{n} of {len(answered)}" for n in counts), f"{len(rows) - len(answered)} of {len(rows)}"]


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Trials and failures by the size of the card, in Markdown."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [("cell", *(f"{name}: answer, trials / failures" for name in peers))]
    lines.append(("---",) * len(lines[0]))
    for cell in dict.fromkeys(row["cell"] for row in rows):
        of = {row["peer"]: row for row in rows if row["cell"] == cell}
        lines.append((cell, *(_growth_text(of.get(name, {})) for name in peers)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _growth_text(row: Mapping[str, Any]) -> str:
    return f"{row['answer']}, {row['trials']} / {row['failures']}" if row.get("answer") else "-"
