"""What processes used of virtual GPUs: the word of each one's own torch, beside the driver's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.units import format_bytes
from autobatch.virtual.state import CardState, read_state

_MOST_LETTERS = 100  # of a command, in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """One process on one card. What only its torch could tell is None if it ended without telling."""

    card_index: int
    card_title: str
    pid: int
    command: tuple[str, ...] | None
    peak_allocated_bytes: int | None
    """Largest sum of live tensors, in bytes."""
    peak_reserved_bytes: int | None
    """Largest sum that torch's allocator took from the card, in bytes."""
    retries: int | None
    """Times the allocator had to give cached memory back and try again."""
    out_of_memory: int | None
    """Times the allocator gave up."""
    driver_peak_bytes: int | None
    """Largest sum the process held of the card, as the driver counts it, in bytes."""
    alive: bool
    """Whether it outlived the command."""


def read_usage(state_path: Path, reports: Path) -> tuple[ProcessUsage, ...]:
    """Every process that used a card, by card and process id, from the driver's state and the hook's files."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("*.json"))]
    return tuple(usage for index, card in enumerate(read_state(state_path)) for usage in _usage_of(index, card, told))


def _usage_of(index: int, card: CardState, told: Sequence[dict[str, Any]]) -> list[ProcessUsage]:
    uuid = card.uuid.removeprefix("GPU-")  # the driver writes it, torch does not
    processes = {process.pid: process for process in card.processes}
    reports = {report["pid"]: report for report in told if uuid in report["cards"]}
    used = {pid for pid, report in reports.items() if report["cards"][uuid]["peak_reserved_bytes"]}
    rows = []
    for pid in sorted(processes.keys() | used):
        process, report = processes.get(pid), reports.get(pid)
        figures = report["cards"][uuid] if report else {}
        rows.append(
            ProcessUsage(
                card_index=index,
                card_title=card.title,
                pid=pid,
                command=tuple(report["command"]) if report else None,
                peak_allocated_bytes=figures.get("peak_allocated_bytes"),
                peak_reserved_bytes=figures.get("peak_reserved_bytes"),
                retries=figures.get("retries"),
                out_of_memory=figures.get("out_of_memory"),
                driver_peak_bytes=process.peak_bytes if process else None,
                alive=process.alive if process else False,
            )
        )
    return rows


def format_usage(usage: Sequence[ProcessUsage]) -> list[str]:
    """``usage`` as the lines of a table for a person."""
    head = ("GPU", "pid", "allocated", "reserved", "driver", "retries", "OOMs", "process")
    return [_columns(*head), *(_line(row) for row in usage)]


def _line(row: ProcessUsage) -> str:
    command = _shortened(row.command) if row.command else "unknown: it ended without telling"
    if row.alive:
        command = "unknown: it is still running"
    sizes = (row.peak_allocated_bytes, row.peak_reserved_bytes, row.driver_peak_bytes)
    counts = ("unknown" if count is None else str(count) for count in (row.retries, row.out_of_memory))
    return _columns(str(row.card_index), str(row.pid), *map(format_bytes, sizes), *counts, command)


def _shortened(command: tuple[str, ...]) -> str:
    # A program given with -c may have many lines, and where the first word lies says little.
    line = " ".join(shlex.join((Path(command[0]).name, *command[1:])).split())
    return line if len(line) <= _MOST_LETTERS else f"{line[: _MOST_LETTERS - 3]}..."


def _columns(*cells: str) -> str:
    widths = (3, 7, 10, 10, 10, 7, 7)
    return "  ".join([*(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)), cells[-1]])
