"""A training run as a person watches it: a bar in a terminal, a line for each epoch elsewhere. And as scalars."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.arguments import check_count
from autobatch.training.events import Event

_REFRESH_S = 0.5  # reading a loss waits for the device


class Display:
    """Shows the events of a run on standard error, as training frameworks do, and leaves standard output alone."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown_s = 0.0

    def __call__(self, event: Event) -> None:
        if event.kind == "window":
            self._window(event)
        elif event.kind in ("epoch", "stopped", "ended"):
            self.close()
        if event.text:
            self._print(event.text)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _print(self, text: str) -> None:
        (self._console if self._bar is None else self._bar.console).print(text, markup=False)

    def _window(self, event: Event) -> None:
        if not self._console.is_terminal:
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(f"epoch {event.epoch + 1}/{event.epochs}", total=event.windows_in_epoch)
            self._bar.start()
        assert self._task is not None
        now_s = time.monotonic()
        said: dict[str, Any] = {}
        if now_s - self._shown_s >= _REFRESH_S and event.loss is not None:
            self._shown_s = now_s
            speed = "" if event.samples_per_s is None else f", {event.samples_per_s:.0f} samples/s"
            said = {"description": f"epoch {event.epoch + 1}/{event.epochs} loss {float(event.loss):.4g}{speed}"}
        self._bar.update(self._task, completed=event.window_in_epoch, **said)


class ScalarLog:
    """Writes a run to a TensorBoard ``SummaryWriter``, or to anything else with ``add_scalar(name, value, step)``.

    Args:
        writer: it is not closed.
        every: so many windows lie between two that are written; reading a loss waits for the device.

    Raises:
        InvalidArgumentError: if ``writer`` has no such method, or ``every`` is no positive whole number.
    """

    def __init__(self, writer: Any, *, every: int = 1) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise InvalidArgumentError("writer", writer, "one with add_scalar(name, value, step)")
        check_count("every", every)
        self._writer, self._every = writer, every

    def __call__(self, event: Event) -> None:
        found: dict[str, Any] = {}
        if event.kind == "window" and event.window is not None and event.windows % self._every == 0:
            found = {
                "train/loss": event.window.loss,
                "train/grad_norm": event.window.grad_norm,
                "train/samples_per_s": event.samples_per_s,
            }
        elif event.evaluation is not None:
            found = {"eval/loss": event.evaluation.loss}
        for name, value in found.items():
            if value is not None:
                self._writer.add_scalar(name, float(value), event.windows)
