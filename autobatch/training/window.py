"""What one optimizer step did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """All the samples of one optimizer step, however many micro-batches they were run in."""

    loss: Tensor
    """The loss as one batch of all the samples would have had it: a scalar on the model's device."""
    grad_norm: Tensor | None
    """The norm of all gradients before clipping, on the model's device; None where there was no loss term."""
    samples: int
    terms: float
    """The loss terms: samples, or what ``count`` says, which may be a sum of weights."""
    micro_batches: int
    stepped: bool
    """False where the optimizers made no step: no loss term at all, or a GradScaler that found an inf."""
    duration_s: float
    """Seconds on the host; a device may still be at work."""
