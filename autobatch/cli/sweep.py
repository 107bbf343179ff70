"""``autobatch probe --sweep``: the largest batch at each of several values of an option."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from autobatch.cli.tables import print_table
from autobatch.cli.targets import ModelOptions, Target, parse_target
from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.result import BatchSizeResult
from autobatch.units import format_bytes

OPTIONS = ("seq_len", "image_size")

Search = Callable[[Target, int | None], BatchSizeResult]
"""Searches for a target, from a first guess if there is one."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """An option of the target and the values to try, in the order given."""

    option: str
    values: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.option}={','.join(map(str, self.values))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value and what was found there; ``result`` is None where not even one sample fits, for ``reason``."""

    value: int
    result: BatchSizeResult | None
    reason: str = ""


def parse_sweep(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> Sweep | None:
    """``OPTION=N,N,...`` as a Sweep; for click."""
    if not texts:
        return None
    if len(texts) > 1:
        raise click.BadParameter(f"{' and '.join(texts)} must be one sweep, of one option")
    (text,) = texts
    name, equals, rest = text.partition("=")
    option, words = name.strip().replace("-", "_"), [word.strip() for word in rest.split(",")]
    if not equals or option not in OPTIONS:
        raise click.BadParameter(f"{text!r} must begin with {'= or '.join(OPTIONS)}=, as in seq_len=512,1024")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text!r} must have positive whole numbers, parted by commas, after {option}=")
    values = tuple(int(word) for word in words)
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise click.BadParameter(f"{text!r} must have each value once, and has {twice[0]} more than once")
    return Sweep(option, values)


def sweep_targets(text: str, options: ModelOptions, sweep: Sweep) -> list[Target]:
    """The target that ``text`` names, once for each value.

    Raises:
        InvalidArgumentError: if the option is given beside the sweep, or the target does not have it.
    """
    if (given := getattr(options, sweep.option)) is not None:
        raise InvalidArgumentError(sweep.option, given, f"left out, for --sweep {sweep} varies it")
    varied: list[dict[str, Any]] = [{sweep.option: value} for value in sweep.values]
    try:
        return [parse_target(text, replace(options, **values)) for values in varied]
    except InvalidArgumentError as exc:
        raise _of_sweep(exc, sweep) from exc


def run_sweep(sweep: Sweep, targets: Sequence[Target], search: Search) -> list[Point]:
    """Searches at each value, the next from where the last ones lead. Prints the frontier.

    Raises:
        DoesNotFitError: if not even one sample fits at any value.
        InvalidArgumentError: naming the sweep, if the target turns out not to have the option.
    """
    from autobatch.probe.search.sweep import next_guess

    points: list[Point] = []
    for value, target in zip(sweep.values, targets, strict=True):
        click.echo(f"{sweep.option}={value}")
        found = [(point.value, point.result) for point in points if point.result is not None]
        try:
            points.append(Point(value=value, result=search(target, next_guess(sweep.option, found, value))))
        except DoesNotFitError as exc:
            click.echo(f"Does not fit at {sweep.option}={value}: {exc}")
            points.append(Point(value=value, result=None, reason=str(exc)))
        except InvalidArgumentError as exc:
            raise _of_sweep(exc, sweep) from exc
        except BaseException:  # what was found until then is worth its time
            if found:
                click.echo(f"Ended at {sweep.option}={value}. Found before:")
                _print_frontier(sweep, points)
            raise
    if all(point.result is None for point in points):
        raise DoesNotFitError(f"not even one sample fits at any value of {sweep}: {points[0].reason}")
    _print_frontier(sweep, points)
    return points


def sweep_json(sweep: Sweep, points: Sequence[Point]) -> str:
    """Every result, as JSON text. A value at which nothing fits has the reason in the place of a result."""
    rows: list[dict[str, Any]] = [
        {
            sweep.option: point.value,
            "batch_size": point.result.batch_size if point.result else None,
            "does_not_fit": point.reason or None,
            "result": json.loads(point.result.to_json()) if point.result else None,
        }
        for point in points
    ]
    return json.dumps({"sweep": sweep.option, "results": rows}, indent=2)


def plot_sweep(sweep: Sweep, points: Sequence[Point], title: str, path: Path) -> None:
    """Draws the frontier."""
    from autobatch.report.plot import plot_frontier

    sizes = [(point.value, point.result.batch_size if point.result else None) for point in points]
    device = next(point.result.environment.get("device", "unknown") for point in points if point.result is not None)
    plot_frontier(sweep.option, sizes, f"{title} on {device}", path)


def _of_sweep(exc: InvalidArgumentError, sweep: Sweep) -> InvalidArgumentError:
    return InvalidArgumentError("sweep", str(sweep), exc.allowed) if exc.argument == sweep.option else exc


def _print_frontier(sweep: Sweep, points: Sequence[Point]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    evaluates = any(point.result is not None and point.result.eval_batch_size is not None for point in points)
    for title in (sweep.option, "largest batch", *["evaluation"] * evaluates, "peak", "trials", "failures"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in points:
        result = point.result
        if result is None:
            table.add_row(str(point.value), "none")
            continue
        measured = next(iter(result.answer_measurements()), None)
        peak_bytes = measured.peak_allocated_bytes if measured is not None else None
        sizes = [str(result.batch_size), *[str(result.eval_batch_size)] * evaluates]
        table.add_row(
            str(point.value), *sizes, format_bytes(peak_bytes), str(len(result.trials)), str(result.oom_count)
        )
    print_table(table)
