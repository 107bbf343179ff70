"""What a run did, and the lines that tell it to a person."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autobatch.result import BatchSizeResult
from autobatch.training.events import Evaluation
from autobatch.training.loop import Position
from autobatch.training.plan import AccumulationPlan
from autobatch.training.sizing import Sizes
from autobatch.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run did."""

    epochs: int
    windows: int
    """Optimizer steps."""
    losses: tuple[float, ...]
    """The mean training loss of each epoch."""
    evaluations: tuple[Evaluation, ...]
    """At the end of each epoch, where there is a data set for it."""
    plan: AccumulationPlan | None
    """How a window is made; None where ranks have sizes of their own."""
    micro_batch_size: int
    """Of this rank, at the end."""
    batch_size: BatchSizeResult | None
    """The probe's answer; None where the size was given, or came from a checkpoint."""
    noise_scale: float | None
    """The batch that the gradients support, in loss terms; None while unknown."""


def headline(result: BatchSizeResult | None, sizes: Sizes, position: Position, epochs: int, found: Path | None) -> str:
    """What a run begins with: where it goes on from, what fits, and how a window is made."""
    if found is not None and position.epoch >= epochs:
        return f"nothing is left to train: {found} is of the end of epoch {position.epoch}"
    said = []
    if found is not None:
        said.append(f"going on from {found} at window {position.window} of epoch {position.epoch + 1}")
    if result is not None:
        failed = "" if result.smallest_failure is None else f" and {result.smallest_failure} does not"
        said.append(f"batch {result.batch_size} fits{failed}")
    return "; ".join([*said, f"an optimizer step is {sizes.equation}"])


def epoch_line(position: Position, epochs: int, *, samples_per_s: float | None, peak_bytes: int | None) -> str:
    """An epoch that is done."""
    said = [f"epoch {position.epoch + 1}/{epochs}: loss {position.losses[-1]:.4g}"]
    if samples_per_s is not None:
        said.append(f"{samples_per_s:.0f} samples/s")
    if peak_bytes is not None:
        said.append(f"peak {format_bytes(peak_bytes)}")
    return ", ".join(said)


def sizes_line(micro_batch_size: int, effective_batch_size: int, noise_scale: float | None, *, is_largest: bool) -> str:
    """The three sizes of a run, apart: to two digits for the gradients', for more is not known of it."""
    supported = "" if noise_scale is None else f", your gradients support about {float(f'{noise_scale:.1e}'):.0f}"
    own = f"{'largest that fits' if is_largest else 'micro-batch'} {micro_batch_size}"
    return f"{own}, effective {effective_batch_size}{supported}"
