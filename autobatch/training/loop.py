"""Epochs of windows, from any window on: trained, told, evaluated, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from autobatch.ranks import Ranks
from autobatch.training.accumulator import Accumulator
from autobatch.training.events import Evaluation, Event, Kind
from autobatch.training.feed import Feed
from autobatch.training.recovery import Recovery
from autobatch.training.stopping import EXIT_CODE, Stopping
from autobatch.training.window import Window


@dataclass(kw_only=True)
class Position:
    """How far a run is: all of it plain, or tensors, for a checkpoint."""

    epoch: int = 0
    window: int = 0
    """Windows of this epoch that are done."""
    loss_sum: Tensor | None = None
    """Over the loss terms of this epoch so far, on the model's device."""
    terms: float = 0.0
    samples: int = 0
    """Of this epoch so far, over all ranks."""
    losses: list[float] = field(default_factory=list)
    """The mean loss of each epoch that is done."""
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def loss(self) -> Tensor | None:
        """The mean over the terms of this epoch so far."""
        return None if self.loss_sum is None or not self.terms else self.loss_sum / self.terms


class Loop:
    """Trains the epochs of one run.

    Args:
        evaluate: the loss over the evaluation's data set, at the end of each epoch; None for no evaluation.
        save: writes a checkpoint and gives its folder; None for none.
        save_every: so many windows lie between two checkpoints, beside those at the start and after each epoch.
        tell: is given each event.
        summary: a line about an epoch that is done, for a person.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        feed: Feed,
        ranks: Ranks,
        *,
        epochs: int,
        evaluate: Callable[[], Evaluation] | None,
        save: Callable[[Position], Path] | None,
        save_every: int | None,
        tell: Callable[[Event], None],
        summary: Callable[[Position, float | None], str],
    ) -> None:
        self._accumulator, self._feed, self._ranks, self._epochs = accumulator, feed, ranks, epochs
        self._evaluate, self._save, self._save_every, self._tell = evaluate, save, save_every, tell
        self._summary, self._stopping = summary, Stopping()
        self.position = Position()
        self._since_s, self._samples_before = 0.0, 0

    def run(self, text: str, *, is_resumed: bool) -> None:
        """Trains from :attr:`position` on. Raises SystemExit where SIGTERM asked for an end."""
        with self._stopping.noted():
            self._event("started", text=text)
            if not is_resumed:
                self._checkpoint()  # that it can be written is known before anything is trained
            while self.position.epoch < self._epochs:
                self._epoch()
            self._event("ended")

    def recovered(self, recovery: Recovery) -> None:
        """Tells of a window that is about to be repeated."""
        smaller = f"micro-batches of {recovery.next_micro_batch_size} instead of {recovery.micro_batch_size}"
        text = f"window {recovery.window} ran out of memory and is repeated in {smaller}: {recovery.message}"
        self._event("recovered", recovery=recovery, text=text)

    def _epoch(self) -> None:
        position = self.position
        self._since_s, self._samples_before = time.perf_counter(), position.samples
        if position.window < self._feed.windows:
            self._windows()
            loss = position.loss
            position.losses.append(float("nan") if loss is None else float(loss))
            self._event("epoch", text=self._summary(position, self._speed()))
        if self._evaluate is not None:
            self._checkpoint()  # an evaluation may take long, or fail
            if self._is_stopping():
                self._stop()
            with self._stopping.at_once():
                position.evaluations.append(self._evaluate())
            found = position.evaluations[-1]
            self._event("evaluated", evaluation=found, text=f"evaluation: loss {found.loss:.4g}")
        self.position = Position(epoch=position.epoch + 1, losses=position.losses, evaluations=position.evaluations)
        self._checkpoint()
        if self._is_stopping() and self.position.epoch < self._epochs:
            self._stop()

    def _windows(self) -> None:
        position = self.position
        for batches in self._feed.epoch(position.epoch, position.window):
            self._add(self._accumulator.step(*batches))
            if position.window == self._feed.windows:
                return  # the epoch's end has a checkpoint of its own
            stop = self._is_stopping()
            if stop or (self._save_every and self._accumulator.windows % self._save_every == 0):
                self._checkpoint()
            if stop:
                self._stop()

    def _add(self, window: Window) -> None:
        position = self.position
        position.window += 1
        position.samples += window.samples
        if window.terms:
            add = window.loss.detach() * window.terms
            position.loss_sum = add if position.loss_sum is None else position.loss_sum + add
            position.terms += window.terms
        self._event("window", window=window, loss=position.loss)

    def _is_stopping(self) -> bool:
        """Whether any rank was asked to: each has to end after the same window."""
        if not self._ranks.are_several:
            return self._stopping.asked
        return bool(self._ranks.sums([float(self._stopping.asked)])[0])

    def _checkpoint(self) -> None:
        if self._save is not None:
            self._event("checkpoint", path=self._save(self.position))

    def _stop(self) -> None:
        text = "stopped by SIGTERM" + ("" if self._save is None else "; the checkpoint is written")
        self._event("stopped", text=text)
        raise SystemExit(EXIT_CODE)

    def _speed(self) -> float | None:
        seconds = time.perf_counter() - self._since_s
        return (self.position.samples - self._samples_before) / seconds if seconds > 0 else None

    def _event(self, kind: Kind, **about: Any) -> None:
        position = self.position
        self._tell(
            Event(
                kind=kind,
                epoch=position.epoch,
                epochs=self._epochs,
                windows=self._accumulator.windows,
                window_in_epoch=position.window,
                windows_in_epoch=self._feed.windows,
                samples_per_s=self._speed() if kind in ("window", "epoch") else None,
                **about,
            )
        )
