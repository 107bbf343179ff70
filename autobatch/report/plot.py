"""A result, or a frontier of several, as a picture: png, svg or pdf."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.errors import InvalidArgumentError, MissingDependencyError
from autobatch.probe.search.memory_fit import MemoryFit
from autobatch.result import BatchSizeResult, Outcome, Trial
from autobatch.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg", ".pdf")

_SIZE_INCHES = (7.5, 4.5)
_DOTS_PER_INCH = 150
_COLORS = {"train": "tab:blue", "eval": "tab:green"}
_FAILED = "tab:red"


def check_plot(path: Path) -> None:
    """Says before any work whether a picture can be made at ``path``.

    Raises:
        InvalidArgumentError: if the ending is none of :data:`ENDINGS`.
        MissingDependencyError: without matplotlib.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InvalidArgumentError("plot", str(path), f"a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("a plot needs matplotlib: pip install 'autobatch-torch[plot]'")


def plot_result(result: BatchSizeResult, path: Path) -> None:
    """Draws peak memory against batch size: what was measured, the fit, the budget and the failures.

    Raises:
        InvalidArgumentError, MissingDependencyError: see :func:`check_plot`.
        OSError: if ``path`` cannot be written.
    """
    check_plot(path)
    figure, axes = _figure()
    comparable = result.environment.get("kind") != "cpu"
    for mode in dict.fromkeys(trial.mode for trial in result.trials):
        _draw_mode(axes, [t for t in (*result.trials, *result.confirmation) if t.mode == mode], mode, fitted=comparable)
    if comparable:
        _draw_limits(axes, result)
    axes.set_title(_title(result), fontsize="medium")
    axes.set_xlabel("batch size")
    axes.set_ylabel("peak memory, GiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def plot_frontier(option: str, sizes: Sequence[tuple[int, int | None]], title: str, path: Path) -> None:
    """Draws the largest batch at each value of ``option``; None is a value at which nothing fits.

    Raises:
        InvalidArgumentError, MissingDependencyError: see :func:`check_plot`.
        OSError: if ``path`` cannot be written.
    """
    check_plot(path)
    figure, axes = _figure()
    fitting = sorted((value, size) for value, size in sizes if size is not None)
    x, y = zip(*fitting, strict=True)
    axes.plot(x, y, "o-", color=_COLORS["train"], label="largest batch")
    for value, size in fitting:
        axes.annotate(str(size), (value, size), textcoords="offset points", xytext=(5, 5), fontsize="small")
    failing = [value for value, size in sizes if size is None]
    if failing:
        axes.plot(failing, [0] * len(failing), "x", color=_FAILED, label="not even one sample fits")
        axes.legend(fontsize="small")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(option)
    axes.set_ylabel("largest batch size")
    axes.margins(0.1)  # room for the numbers
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _figure() -> tuple[Any, Axes]:
    from matplotlib.figure import Figure  # without pyplot: nothing of a program's own figures is touched

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    return figure, figure.add_subplot()


def _draw_mode(axes: Axes, trials: list[Trial], mode: str, *, fitted: bool) -> None:
    color, named = _COLORS[mode], f" ({mode})" if mode != "train" else ""
    for attribute, fill, label in (
        ("peak_allocated_bytes", color, "allocated"),
        ("peak_reserved_bytes", "none", "reserved"),
    ):
        points = [point for trial in trials if trial.fits and (point := _point(trial, attribute))]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=28, facecolor=fill, edgecolor=color, label=f"{label}{named}")
    # A failure held less than it needed: the mark stands where it ran out.
    failed = [point for trial in trials if not trial.fits and (point := _point(trial, "peak_allocated_bytes"))]
    if failed:
        x, y = zip(*failed, strict=True)
        axes.scatter(x, y, marker="x", color=_FAILED, label=f"{_failure_word(trials)}{named}")
    if fitted:
        _draw_fit(axes, trials, color, named)


def _draw_fit(axes: Axes, trials: list[Trial], color: str, named: str) -> None:
    """The two lines that the search goes by, from the origin of the sizes to where each meets what was allowed."""
    fitting = [t for t in trials if t.fits and t.measurement is not None and not t.history]
    if not fitting:
        return
    capacity_bytes = next((t.measurement.capacity_bytes for t in fitting if t.measurement), None)
    fit = MemoryFit(capacity_bytes)
    for trial in fitting:
        fit.learn(trial.batch_size, trial.measurement)
    largest = max(fitting, key=lambda trial: trial.batch_size)
    for attribute, end, style, label in (
        ("peak_allocated_bytes", fit.bound(largest.batch_size), "-", "fit, allocated"),
        ("peak_reserved_bytes", fit.aim(largest.batch_size), ":", "fit, reserved"),
    ):
        point = _point(largest, attribute)
        if point is None or end is None or capacity_bytes is None or end == point[0]:
            continue
        slope = (capacity_bytes / GIB - point[1]) / (end - point[0])
        start = max(0.0, point[0] - point[1] / slope) if slope > 0 else 0.0
        axes.plot(
            [start, end],
            [point[1] + slope * (start - point[0]), capacity_bytes / GIB],
            style,
            color=color,
            linewidth=1,
            label=f"{label}{named}",
        )


def _draw_limits(axes: Axes, result: BatchSizeResult) -> None:
    if result.budget_bytes is None:
        return
    axes.axhline(result.budget_bytes / GIB, color="black", linewidth=1, label="budget")
    if result.headroom:
        allowed = result.budget_bytes * (1 - result.headroom) / GIB
        axes.axhline(allowed, color="black", linewidth=1, linestyle="--", label=f"less {result.headroom:.0%} headroom")


def _point(trial: Trial, attribute: str) -> tuple[int, float] | None:
    size_bytes = getattr(trial.measurement, attribute, None)
    return None if size_bytes is None else (trial.batch_size, size_bytes / GIB)


def _failure_word(trials: list[Trial]) -> str:
    kinds = {trial.outcome for trial in trials if not trial.fits}
    return "out of memory" if kinds == {Outcome.OOM} else "does not fit"


def _title(result: BatchSizeResult) -> str:
    workload = result.environment.get("workload")
    return f"{workload}\n{result.conclusion}" if workload else result.conclusion
