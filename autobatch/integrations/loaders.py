"""What a DataLoader of a trainer draws from, and the batch size that it draws with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autobatch.errors import UnsupportedTrainerError


@dataclass(frozen=True, slots=True)
class Source:
    """The samples behind a loader."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    batch_size: int
    """What the loader draws at once now."""


def source_of(loader: Any, name: str = "the training loader", *, remade: bool = False) -> Source:
    """What ``loader`` draws from, without drawing anything.

    Args:
        remade: whether its owner makes another loader for another batch size, so that a batch sampler of any kind will
            do that says how many samples it draws.

    Raises:
        UnsupportedTrainerError: if it cannot be given a batch size, or if no worst batch can be made of its samples.
    """
    if not isinstance(loader, DataLoader):
        raise UnsupportedTrainerError(f"{name} is a {type(loader).__name__}; it must be a torch DataLoader")
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UnsupportedTrainerError(
            f"{name} reads {type(dataset).__name__}, a stream, which does not show its longest samples; "
            "it must read a data set with a length and samples by number. A function of n does for autobatch.find()"
        )
    if not hasattr(dataset, "__len__"):
        raise UnsupportedTrainerError(f"{name} reads {type(dataset).__name__}, which has no length")
    sampler = _innermost(loader)
    if sampler is None:
        raise UnsupportedTrainerError(f"{name} has batch_size=None: its samples are not put into batches")
    if not isinstance(sampler, BatchSampler) or not (remade or _takes_batch_size(sampler)):
        raise UnsupportedTrainerError(
            f"{name} has a batch sampler of its own, {type(sampler).__name__}, which cannot be given a batch size; "
            "it must be torch's BatchSampler"
        )
    return Source(dataset, loader.collate_fn, sampler.batch_size)


def set_batch_size(loader: DataLoader[Any], batch_size: int) -> None:
    """Makes ``loader`` draw ``batch_size`` samples at once from now on. Everything else of it stays as it is.

    It is changed in place: whoever holds it, a prepared loader around it or a trainer, draws with the new size.
    """
    sampler: Any = loader.batch_sampler
    while sampler is not None:
        if hasattr(sampler, "batch_size"):  # one that shares batches out over ranks has noted how large they are
            sampler.batch_size = batch_size
        sampler = getattr(sampler, "batch_sampler", None)
    # A loader refuses assignment, for its batch sampler would not know; here it does, and whoever makes another loader
    # of this one reads it.
    if loader.batch_size is not None:
        vars(loader)["batch_size"] = batch_size


def _innermost(loader: DataLoader[Any]) -> Any:
    """The batch sampler that cuts the batches: a library that shares them out over ranks puts its own around it."""
    sampler: Any = loader.batch_sampler
    while sampler is not None and hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return sampler


def _takes_batch_size(sampler: BatchSampler) -> bool:
    """Whether the batches of ``sampler`` are as large as its attribute says: a subclass may cut them by itself."""
    return type(sampler).__iter__ is BatchSampler.__iter__
