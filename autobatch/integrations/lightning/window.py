"""The last window of an epoch where it is shorter than the others, weighted by its samples.

Lightning divides the loss of each micro-batch by ``accumulate_grad_batches``, also in a window that has fewer of them
(Lightning#19987), and gives a last micro-batch of fewer samples the weight of a whole one. What is put right here is
exact for a loss that is a mean over samples, where the micro-batches of all ranks are alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autobatch.training.plan import AccumulationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    samples: int
    """Of this rank."""
    last: int
    """Samples of its last micro-batch."""


def weigh_earlier(trainer: Any, plan: AccumulationPlan) -> None:
    """Before the last backward pass: gives the gradients so far the weight that they have beside the last one's."""
    window = _short_window(trainer, plan)
    if window is not None and window.last < plan.micro_batch_size:
        _scale(_parameters(trainer.optimizers), plan.micro_batch_size / window.last)


def weigh_all(trainer: Any, plan: AccumulationPlan, optimizer: Any) -> None:
    """Before the optimizer's step, and before clipping: makes the gradients the mean over the window's samples."""
    window = _short_window(trainer, plan)
    if window is not None:
        _scale(_parameters([optimizer]), plan.steps * window.last / window.samples)


def _short_window(trainer: Any, plan: AccumulationPlan) -> _Window | None:
    """The present window, if it is the last of an epoch, at its last micro-batch, and shorter than the others."""
    number, batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
    if plan.steps == 1 or number != batches:
        return None
    (loader,) = trainer.fit_loop._combined_loader.flattened
    sampler, last = loader.batch_sampler, plan.micro_batch_size
    if batches == len(loader) and not sampler.drop_last:
        last = len(sampler.sampler) - plan.micro_batch_size * (batches - 1)
    micro_batches = (batches - 1) % plan.steps + 1
    samples = (micro_batches - 1) * plan.micro_batch_size + last
    full = plan.steps * plan.micro_batch_size
    return None if samples == full else _Window(samples=samples, last=last)


def _parameters(optimizers: Iterable[Any]) -> list[nn.Parameter]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _scale(parameters: list[nn.Parameter], factor: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
