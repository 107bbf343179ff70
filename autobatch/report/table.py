"""A result, or the trials so far, as a rich table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial, folded
from autobatch.units import format_bytes, format_seconds

_BAR_WIDTH = 24
_STYLES = {
    Outcome.FITS: "green",
    Outcome.OVER_HEADROOM: "yellow",
    Outcome.THRASHED: "yellow",
    Outcome.OOM: "red",
    Outcome.LIMIT: "red",
}
_WORDS = {
    Outcome.FITS: "fits",
    Outcome.OVER_HEADROOM: "took more than it may",
    Outcome.THRASHED: "thrashes",
    Outcome.OOM: "out of memory",
    Outcome.LIMIT: "kernel limit",
}


def result_table(result: BatchSizeResult) -> Table:
    """Every trial of ``result``, those that confirmed it last."""
    environment = result.environment
    return trials_table(
        [*result.trials, *result.confirmation],
        comparable=environment.get("kind") != "cpu",
        timed=not environment.get("virtual", False),
    )


def trials_table(trials: Sequence[Trial], *, comparable: bool, timed: bool) -> Table:
    """``trials`` one a row: size, outcome, peak as a bar against the budget, time.

    Args:
        comparable: whether peak and budget count the same bytes; without that there is no bar.
        timed: whether a step's time means anything. On a virtual GPU it does not.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("batch", justify="right")
    table.add_column("outcome")
    if comparable:
        table.add_column("peak of the budget", width=_BAR_WIDTH)
    table.add_column("peak", justify="right")
    if timed:
        table.add_column("step", justify="right")
    table.add_column("took", justify="right")
    table.add_column("")
    for trial in folded(trials):
        measured = trial.measurement or Measurement(peak_allocated_bytes=None, peak_reserved_bytes=None)
        table.add_row(
            str(trial.batch_size),
            Text(_WORDS[trial.outcome], style=_STYLES[trial.outcome]),
            *([_bar(trial, measured)] if comparable else []),
            format_bytes(measured.peak_allocated_bytes),
            *([format_seconds(measured.step_time_s)] if timed else []),
            format_seconds(trial.duration_s),
            Text(remark(trial), style="dim", overflow="ellipsis", no_wrap=True),
        )
    return table


def remark(trial: Trial) -> str:
    """What else there is to say of a trial: what it confirms, what was noticed."""
    confirms = f"{'confirmed' if trial.fits else 'not confirmed'} after {trial.history}" if trial.history else ""
    # An out-of-memory error says nothing that the outcome does not.
    message = "" if trial.outcome is Outcome.OOM else trial.message
    return ", ".join(part for part in (trial.mode if trial.mode != "train" else "", confirms, message) if part)


def _bar(trial: Trial, measured: Measurement) -> ProgressBar | str:
    peak_bytes, capacity_bytes = measured.peak_allocated_bytes, measured.capacity_bytes
    if peak_bytes is None or not capacity_bytes:
        return "unknown"
    style = _STYLES[trial.outcome]
    return ProgressBar(
        total=capacity_bytes,
        completed=min(peak_bytes, capacity_bytes),
        width=_BAR_WIDTH,
        complete_style=style,
        finished_style=style,
    )
