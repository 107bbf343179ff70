"""The loaders of a Lightning trainer: where they come from, and by what they take another batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from autobatch.errors import UnsupportedTrainerError
from autobatch.integrations.loaders import set_batch_size, source_of

TRAINING_NAMES = ("batch_size", "train_batch_size")
EVALUATION_NAMES = ("eval_batch_size", "val_batch_size", "batch_size")
"""Attributes of a module, of a data module, or of their hparams, that their loaders may follow."""


class Loaders:
    """The loaders of training, or those of evaluation.

    Args:
        origin: Lightning's source of them: what ``fit()`` was given, or a hook that makes them.
        holders: the objects that may have an attribute which such a hook follows.
        names: these attributes.
        is_training: for training there is one loader; for evaluation there may be several.

    Raises:
        UnsupportedTrainerError: if one of them cannot be given a batch size.
    """

    def __init__(self, origin: Any, holders: Sequence[Holder], names: Sequence[str], *, is_training: bool) -> None:
        self._origin, self._holders, self.is_given = origin, holders, not origin.is_module()
        self.title = "training" if is_training else "evaluation"
        self.made = origin.dataloader()
        self.flat: list[DataLoader[Any]] = [self.made] if is_training else flattened(self.made)
        each = "the training loader" if is_training else "an evaluation loader"
        self.sources = [source_of(loader, each, remade=not self.is_given) for loader in self.flat]
        self.batch_sizes = [source.batch_size for source in self.sources]
        self.attribute = None if self.is_given else next(filter(self._follows, names), None)
        """What the hook that makes them follows; None where they are set themselves."""
        if self.attribute is None:
            for loader in self.flat:
                source_of(loader, each)

    @property
    def owners(self) -> list[str]:
        """Who has the attribute, in words."""
        return [holder.title for holder in self._holders if self.attribute is not None and holder.has(self.attribute)]

    def give(self, batch_size: int) -> None:
        """Makes the loaders of the next epochs draw ``batch_size`` samples at once."""
        if self.attribute is not None:
            for holder in self._holders:
                if holder.has(self.attribute):
                    holder.put(self.attribute, batch_size)
            return
        for loader in self.flat:
            set_batch_size(loader, batch_size)
        if not self.is_given:
            self._origin.instance = self.made  # in place of the hook, which would make others

    def sizes_with(self, attribute: str, value: int) -> set[int]:
        """The batch sizes of the loaders that the hook makes while ``attribute`` is ``value``."""
        with _attribute(self._holders, attribute, value):
            return {source_of(loader, remade=True).batch_size for loader in flattened(self._origin.dataloader())}

    def _follows(self, attribute: str) -> bool:
        if not present([attribute], self._holders):
            return False
        other = max(self.batch_sizes, default=0) + 1
        return self.sizes_with(attribute, other) == {other}


def flattened(loaders: Any) -> list[Any]:
    """The loaders in what ``fit()`` takes, or a hook returns, for evaluation.

    Raises:
        UnsupportedTrainerError: if they are drawn from at the same time.
    """
    if loaders is None:
        return []
    if hasattr(loaders, "flattened"):  # a CombinedLoader
        if loaders._mode != "sequential":
            raise UnsupportedTrainerError(
                f"the evaluation loaders are combined in mode {loaders._mode!r}; it must be 'sequential', one after "
                "the other"
            )
        return list(loaders.flattened)
    if isinstance(loaders, dict):
        return [loader for each in loaders.values() for loader in flattened(each)]
    if isinstance(loaders, (list, tuple)):
        return [loader for each in loaders for loader in flattened(each)]
    return [loaders]


def samples_of_rank(loader: DataLoader[Any], world_size: int) -> int:
    """The samples that a rank draws from ``loader`` in an epoch."""
    assert loader.batch_sampler is not None, "checked by source_of()"
    sampler = getattr(loader.batch_sampler, "sampler", None)
    samples = len(sampler) if hasattr(sampler, "__len__") else len(loader.dataset)  # type: ignore[arg-type]
    return samples if isinstance(sampler, DistributedSampler) else -(-samples // world_size)


class Holder:
    """A module or data module, or its hparams: where an attribute may stand that its loaders follow."""

    def __init__(self, item: Any, title: str) -> None:
        self._item, self.title = item, title

    def has(self, name: str) -> bool:
        return name in self._item if isinstance(self._item, MutableMapping) else hasattr(self._item, name)

    def get(self, name: str) -> Any:
        return self._item[name] if isinstance(self._item, MutableMapping) else getattr(self._item, name)

    def put(self, name: str, value: Any) -> None:
        if isinstance(self._item, MutableMapping):
            self._item[name] = value
        else:
            setattr(self._item, name, value)


def holders_of(*owners: Any) -> list[Holder]:
    """The holders that ``owners`` are, and those that their hparams are; None is no owner."""
    known = [owner for owner in owners if owner is not None]
    hparams = [
        (owner.hparams, f"the hparams of {type(owner).__name__}") for owner in known if hasattr(owner, "hparams")
    ]
    return [Holder(item, title) for item, title in (*((owner, type(owner).__name__) for owner in known), *hparams)]


def present(names: Sequence[str], holders: Sequence[Holder]) -> list[str]:
    """Those of ``names`` that a holder has."""
    return [name for name in names if any(holder.has(name) for holder in holders)]


@contextlib.contextmanager
def _attribute(holders: Sequence[Holder], name: str, value: int) -> Iterator[None]:
    before = [(holder, holder.get(name)) for holder in holders if holder.has(name)]
    try:
        for holder, _ in before:
            holder.put(name, value)
        yield
    finally:
        for holder, old in before:
            holder.put(name, old)
