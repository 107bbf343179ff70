"""What a training run tells those who listen: one record, one function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from autobatch.training.recovery import Recovery
from autobatch.training.window import Window

Kind = Literal["started", "window", "recovered", "epoch", "evaluated", "checkpoint", "stopped", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss over a whole data set, without gradients."""

    loss: float
    samples: int
    terms: float
    batch_size: int
    """Samples that were run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in a training run. What an event has nothing to say of is None."""

    kind: Kind
    """``started`` (or gone on with), ``window`` after each optimizer step, ``recovered`` before a window is repeated in
    smaller micro-batches, ``epoch`` and ``evaluated`` at the end of one, ``checkpoint`` once it is on disk, ``stopped``
    by SIGTERM, ``ended``."""
    epoch: int
    """From 0 on."""
    epochs: int
    windows: int
    """Optimizer steps of the whole run so far."""
    window_in_epoch: int
    """Windows of this epoch so far."""
    windows_in_epoch: int
    """Windows that an epoch has."""
    window: Window | None = None
    loss: Tensor | None = None
    """The mean over the loss terms of this epoch so far, on the model's device: reading it waits for the device."""
    samples_per_s: float | None = None
    """Of this epoch, over all ranks, since the run began or went on."""
    evaluation: Evaluation | None = None
    recovery: Recovery | None = None
    path: Path | None = None
    """The folder of the checkpoint."""
    text: str = ""
    """One line for a person."""


class Callback(Protocol):
    """Is called with every :class:`Event` of a run, on every rank. What it raises ends the run."""

    def __call__(self, event: Event, /) -> None: ...
