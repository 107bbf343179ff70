"""The loss over a whole data set, without gradients, in batches that fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, default_collate

from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.ranks import Ranks
from autobatch.training.events import Evaluation
from autobatch.training.feed import heed_one_sigterm_less
from autobatch.training.passes import Passes
from autobatch.training.recovery import Snapshot, forget
from autobatch.training.split import micro_batches, samples_of
from autobatch.training.verdict import Kind, raise_own, verdict_of


def evaluate(
    passes: Passes,
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    workers: int,
    ranks: Ranks,
    agreed: Callable[[Callable[[], None]], Any],
    reduction: str,
    in_step: bool,
) -> Evaluation:
    """The mean loss over the loss terms of ``dataset``, of which each rank takes its share.

    A batch that runs out of memory is repeated in halves, and later ones are as small.

    Args:
        agreed: runs a function on every rank, and raises on all where it raises on one.
        in_step: whether the model needs all ranks in forward at the same time. Then nothing is repeated, and a rank
            that is done runs a sample along that does not count.

    Raises:
        InvalidArgumentError: if such a model has ranks without a sample.
        DoesNotFitError: not even one sample fits.
        Exception: what the model raises for another reason than memory, unchanged.
    """
    if in_step and len(dataset) < ranks.size:
        raise InvalidArgumentError("dataset", f"{len(dataset)} samples", f"one for each of {ranks.size} ranks, or more")
    loader = _loader(dataset, ranks, batch_size=batch_size, collate_fn=collate_fn, workers=workers)
    most, own = max(ranks.gather(len(loader))), list[_Sums]()

    def run() -> None:
        own.append(_run(passes, loader, batch_size, reduction, in_step=in_step))
        for _ in range(most - len(loader) if in_step else 0):
            passes.loss((collate_fn or default_collate)([dataset[ranks.rank]]))

    with _evaluating(passes):
        agreed(run)
    loss, terms, samples = ranks.sums([own[0].loss, own[0].terms, own[0].samples])
    mean = loss / terms if terms else float("nan")
    return Evaluation(loss=mean, samples=int(samples), terms=terms, batch_size=own[0].batch_size)


@contextlib.contextmanager
def _evaluating(passes: Passes) -> Iterator[None]:
    """Inside, modules are in eval mode; what is drawn and counted there does not change how training goes on."""
    modules = [part for module in passes.modules for part in module.modules()]
    training = [module for module in modules if module.training]
    snapshot = Snapshot(passes.modules, passes.devices)
    for module in passes.modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        snapshot.restore()


@dataclass(slots=True)
class _Sums:
    """Of this rank, so far."""

    batch_size: int
    loss: float = 0.0
    terms: float = 0.0
    samples: int = 0


def _loader(
    dataset: Any,
    ranks: Ranks,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    workers: int,
) -> Sequence[Any] | DataLoader[Any]:
    mine = range(ranks.rank, len(dataset), ranks.size)
    if not mine:
        return ()
    return DataLoader(
        Subset(dataset, mine),
        batch_size=batch_size,
        collate_fn=collate_fn or default_collate,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=heed_one_sigterm_less,
    )


def _run(passes: Passes, loader: Iterable[Any], batch_size: int, reduction: str, *, in_step: bool) -> _Sums:
    sums = _Sums(batch_size)
    for batch in loader:
        samples = samples_of(batch)
        while (found := _batch(passes, batch, samples, sums.batch_size, reduction, in_step=in_step)) is None:
            sums.batch_size = max(1, min(sums.batch_size, samples) // 2)
        sums.loss, sums.terms, sums.samples = sums.loss + found[0], sums.terms + found[1], sums.samples + samples
    return sums


def _batch(
    passes: Passes, batch: Any, samples: int, size: int, reduction: str, *, in_step: bool
) -> tuple[float, float] | None:
    """The sum of the losses and the terms of ``batch``. None if memory ran out, and less can be tried."""
    failure: BaseException | None = None
    try:
        parts = [passes.counted(part) for part in micro_batches(batch, samples, size)]
        # Where other ranks wait in forward, a batch without a term runs too.
        losses = [(passes.loss(part.batch), part.terms) for part in parts if part.terms or in_step]
        total = sum(float(loss) * (terms if reduction == "mean" else 1.0) for loss, terms in losses if terms)
        return total, sum(part.terms for part in parts)
    except Exception as exc:  # noqa: BLE001 - judged below: what is not memory is raised unchanged
        failure = exc
    verdict = verdict_of(failure, min(size, samples))
    try:
        if in_step or verdict.kind in (Kind.BROKEN, Kind.UNSURE):
            raise_own(failure, "an evaluation")
        forget(failure, passes.device)
        if verdict.kind is Kind.LEAST:
            raise DoesNotFitError(f"in an evaluation not even one sample fits: {verdict.message}")
    finally:
        del failure
    return None
