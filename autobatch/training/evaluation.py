"""The loss over a whole data set, without gradients, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, default_collate

from autobatch.device.oom import Tier, classify, first_line
from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.probe.random_numbers import random_states
from autobatch.ranks import Ranks
from autobatch.training.events import Evaluation
from autobatch.training.feed import heed_no_sigterm
from autobatch.training.passes import Passes
from autobatch.training.recovery import forget
from autobatch.training.split import micro_batches, samples_of


def evaluate(
    passes: Passes,
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    workers: int,
    ranks: Ranks,
    reduction: str,
    in_step: bool,
) -> Evaluation:
    """The mean loss over the loss terms of ``dataset``, of which each rank takes its share.

    A batch that runs out of memory is repeated in halves, and later ones are as small.

    Args:
        in_step: whether the model needs all ranks in forward at the same time. Then nothing is repeated, and a rank
            that is done runs a sample along that does not count.

    Raises:
        InvalidArgumentError: if such a model has ranks without a sample.
        DoesNotFitError: not even one sample fits.
        Exception: what the model raises for another reason than memory, unchanged.
    """
    if in_step and len(dataset) < ranks.size:
        raise InvalidArgumentError("dataset", f"{len(dataset)} samples", f"one for each of {ranks.size} ranks, or more")
    modules = [part for module in passes.modules for part in module.modules()]
    training = [module for module in modules if module.training]
    chances = random_states(str(passes.device))
    for module in passes.modules:
        module.eval()
    try:
        size, sums = batch_size, [0.0, 0.0, 0.0]
        mine = range(ranks.rank, len(dataset), ranks.size)
        loader: DataLoader[Any] = DataLoader(
            Subset(dataset, mine),
            batch_size=batch_size,
            collate_fn=collate_fn or default_collate,
            num_workers=workers,
            generator=torch.Generator(),
            worker_init_fn=heed_no_sigterm,
        )
        most = max(ranks.gather(len(loader)))
        with torch.no_grad():
            for batch in loader if len(mine) else ():
                size, found = _batch(passes, batch, size, reduction, is_repeated=not in_step)
                sums = [one + other for one, other in zip(sums, found, strict=True)]
            for _ in range(most - len(loader)) if in_step else ():
                passes.loss((collate_fn or default_collate)([dataset[mine[0]]]))
    finally:
        for module in training:
            module.training = True
        for put_back, state in chances:  # what is drawn to evaluate is not to change how training goes on
            put_back(state)
    loss, terms, samples = ranks.sums(sums)
    mean = loss / terms if terms else float("nan")
    return Evaluation(loss=mean, samples=int(samples), terms=terms, batch_size=size)


def _batch(passes: Passes, batch: Any, size: int, reduction: str, *, is_repeated: bool) -> tuple[int, list[float]]:
    samples = samples_of(batch)
    while True:
        failure = None
        try:
            parts = [passes.counted(part) for part in micro_batches(batch, samples, size)]
            losses = [(passes.loss(part.batch), part.terms) for part in parts if part.terms]
            total = sum(float(loss) * (terms if reduction == "mean" else 1.0) for loss, terms in losses)
            return size, [total, sum(part.terms for part in parts), samples]
        except Exception as exc:  # noqa: BLE001 - classified below: what is not memory is raised unchanged
            failure = exc
        try:
            if not is_repeated or classify(failure) not in (Tier.DEFINITE, Tier.SUSPECT, Tier.LIMIT):
                raise failure
            message = first_line(failure)
            forget(failure, passes.device)
            if size == 1:
                raise DoesNotFitError(f"in the evaluation not even one sample fits: {message}")
        finally:
            del failure
        size = max(1, min(size, samples) // 2)
