"""``autobatch cache``: the answers that were kept."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from autobatch.cli.errors import DEVICE_ERROR, Failure, traceback_option
from autobatch.cli.tables import print_table


@click.group()
def cache() -> None:
    """Show or remove the answers that `autobatch probe` and find(cache=True) kept.

    They are in the user's cache folder, or in the one that AUTOBATCH_CACHE_DIR names.
    """


@cache.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes, times in seconds since 1970.")
@traceback_option
def list_(as_json: bool) -> None:
    """Show every answer: when it was found, of what, on what, and the batch size."""
    from autobatch.probe.cache import ResultCache, default_folder

    folder = default_folder()
    rows = [_row(entry) for entry in ResultCache(folder).entries()]
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "answers": rows}, indent=2))
    elif rows:
        print_table(_table(rows))
        click.echo(f"{len(rows)} in {folder}")
    else:
        click.echo(f"No answers in {folder}")


@cache.command()
@traceback_option
def clear() -> None:
    """Remove every answer. Other files in the folder stay."""
    from filelock import Timeout

    from autobatch.probe.cache import ResultCache, default_folder

    folder = default_folder()
    try:
        removed = ResultCache(folder).clear()
    except (OSError, Timeout) as exc:
        raise Failure(f"the cache folder {folder} cannot be cleared: {exc}", DEVICE_ERROR) from exc
    click.echo(f"Removed {removed} answer{'' if removed == 1 else 's'} from {folder}")


def _row(entry: Any) -> dict[str, Any]:
    result = entry.result
    options = entry.question.get("options", {})
    return {
        "saved_at_s": entry.saved_at_s,
        "workload": result.environment.get("workload"),
        "device": result.environment.get("device"),
        "virtual": bool(result.environment.get("virtual")),
        "batch_size": result.batch_size,
        "eval_batch_size": result.eval_batch_size,
        "proof": result.proof,
        "budget_bytes": result.budget_bytes,
        "trials": result.trial_count,
        "options": {name: value for name, value in options.items() if value is not None},
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from autobatch.units import format_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("found", no_wrap=True)
    table.add_column("workload")
    table.add_column("device")
    for title in ("budget", "headroom", "batch"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        device = f"{row['device'] or 'unknown'}{' (virtual)' if row['virtual'] else ''}"
        headroom = row["options"].get("headroom")
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["saved_at_s"])),
            str(row["workload"] or "unknown"),
            device,
            format_bytes(row["budget_bytes"]),
            "unknown" if headroom is None else f"{headroom:.0%}",
            str(row["batch_size"]),
        )
    return table
