"""Where batches of n samples come from: a function of n, one example batch, or a data set.

Of a data set the worst case is tried, its n longest samples. Where lengths differ, a batch a little shorter comes
first and an answer must survive shuffled epochs: the order of sizes decides how an allocator's memory is cut up.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.within import Extent
from autobatch.probe.workload.batch import leaves, mapped, tensors

Batches = Callable[[int], Any]
"""Makes a batch of n samples."""

SAME_SIZE = 64
"""So many samples are measured at first; if they are of one size, so are the others."""

MEASURED = 4096
"""At most so many samples are measured, spread over the data set."""

_A_LITTLE_SHORTER = 0.9
"""Of the longest length. Blocks a little too small to be used again leave the most behind: on virtual cards of 24 and
80 GiB, BERT-base with lengths of 3 to 512 runs out in one step after such a batch at the size (44 and 152) from which
it does in some shuffled epoch, where the longest alone still fit at 50 and 174."""


def batches_of(sample: Any, collate_fn: Callable[[list[Any]], Any] | None, length: Any) -> Batches:
    """What ``Workload(sample=...)`` means.

    Raises:
        InvalidArgumentError: naming the argument that is wrong.
    """
    if isinstance(sample, DataLoader):
        allowed = "its data set: sample=loader.dataset, collate_fn=loader.collate_fn"
        raise InvalidArgumentError("sample", "a DataLoader", allowed)
    options = {"collate_fn": collate_fn, "length": length}
    given = [name for name, value in options.items() if value is not None]
    if _is_dataset(sample) or (given and isinstance(sample, (list, tuple))):
        return DatasetBatches(sample, collate_fn, length)
    if given:
        raise InvalidArgumentError(given[0], options[given[0]], "left out unless sample is a data set")
    return sample if callable(sample) else TiledBatch(sample)


class TiledBatch:
    """Batches cut from one example, or tiled with it, along the first dimension of its tensors."""

    def __init__(self, example: Any) -> None:
        sizes = sorted({tensor.shape[0] for tensor in tensors(example) if tensor.dim()})
        allowed = "a function of n that returns a batch of n samples, a data set, or an example batch of tensors"
        if not sizes:
            raise InvalidArgumentError("sample", _short(example), allowed)
        if len(sizes) > 1:
            agreed = "an example batch whose tensors have one size along dim 0 (a list of samples needs collate_fn=)"
            raise InvalidArgumentError("sample", f"tensors of {sizes} samples", agreed)
        if sizes == [0]:
            raise InvalidArgumentError("sample", "a batch of no samples", "an example batch of at least one")
        self._example = example

    def __call__(self, n: int) -> Any:
        return mapped(self._example, _is_batched, lambda tensor: _resized(tensor, n))


class DatasetBatches:
    """Batches of a data set: called with n, its n longest samples, collated.

    Each sample is loaded once and kept, except for shuffled batches; what is collated is a copy as far as lists and
    mappings go, for a collate function may take apart or pad in place what it is given.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, length: Any) -> None:
        if collate_fn is not None and not callable(collate_fn):
            raise InvalidArgumentError("collate_fn", collate_fn, "a function of a list of samples, or None")
        self._dataset, self._collate = dataset, collate_fn or default_collate
        samples = _count(dataset)
        lengths = _measured(dataset, samples) if length is None else dict(enumerate(_lengths(dataset, samples, length)))
        varies = len(set(lengths.values())) > 1
        self._order: Sequence[int] = range(samples)
        self._shorter: Sequence[int] = ()
        if varies:
            self._order = sorted(lengths, key=lengths.__getitem__, reverse=True)
            longest = lengths[self._order[0]]
            shorter = [index for index in self._order if lengths[index] < longest]
            self._shorter = [index for index in shorter if lengths[index] <= _A_LITTLE_SHORTER * longest] or shorter
        self._loaded: dict[int, Any] = {}
        self.extent = Extent(samples=samples, varies=varies)

    def __call__(self, n: int) -> Any:
        return self._batch(self._order, n)

    def shorter(self, n: int) -> Any:
        """The n longest of the samples that are a little shorter than the longest of all; for lengths that differ."""
        return self._batch(self._shorter, n)

    def _batch(self, order: Sequence[int], n: int) -> Any:
        """The first n of ``order``. Where it has fewer, they stand for others: only some samples were measured."""
        chosen = [order[i % len(order)] for i in range(n)]
        self._loaded |= {index: self._dataset[index] for index in chosen if index not in self._loaded}
        return self._collate([_unshared(self._loaded[index]) for index in chosen])

    def shuffled(self, seed: int) -> Batches:
        """Batches in the order of an epoch shuffled with ``seed``, and of one more when it ends.

        A last batch that is not full is left out.
        """
        chance = random.Random(seed)
        left: list[int] = []

        def draw(n: int) -> Any:
            if len(left) < n:
                left[:] = chance.sample(range(self.extent.samples), self.extent.samples)
            return self._collate([_unshared(self._dataset[left.pop()]) for _ in range(n)])

        return draw


def _is_dataset(sample: Any) -> bool:
    if isinstance(sample, Dataset):
        return True
    if callable(sample) or isinstance(sample, (Tensor, Mapping, list, tuple, str, bytes)):
        return False
    return hasattr(sample, "__len__") and hasattr(sample, "__getitem__")


def _count(dataset: Any) -> int:
    allowed = "a data set with a length and samples by number: a stream does not show which are its longest"
    if isinstance(dataset, IterableDataset):
        raise InvalidArgumentError("sample", type(dataset).__name__, allowed)
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError) as exc:
        raise InvalidArgumentError("sample", type(dataset).__name__, allowed) from exc
    if not count:
        raise InvalidArgumentError("sample", f"{type(dataset).__name__} of 0 samples", "a data set that is not empty")
    return count


def _lengths(dataset: Any, samples: int, length: Any) -> Iterator[float]:
    """The length of every sample, in the unit of the caller's."""
    if not callable(length):
        if isinstance(length, (str, bytes, Mapping)) or not hasattr(length, "__len__"):
            raise InvalidArgumentError("length", _short(length), "a function of one sample, or a list of lengths")
        if len(length) != samples:
            allowed = f"as many as the data set has samples, {samples}"
            raise InvalidArgumentError("length", f"{len(length)} lengths", allowed)
    values = (_own_length(length, dataset, index) for index in range(samples)) if callable(length) else length
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise InvalidArgumentError("length", _short(value), f"a number from 0 on for every sample (sample {index})")
        yield number


def _own_length(length: Callable[[Any], Any], dataset: Any, index: int) -> Any:
    sample = dataset[index]
    try:
        return length(sample)
    except Exception as exc:
        # Its own error, which says what is wrong; only where is not known to it. (add_note() is there from 3.11 on.)
        exc.__dict__.setdefault("__notes__", []).append(f"in length= for sample {index} of the data set")
        raise


def _measured(dataset: Any, samples: int) -> dict[int, float]:
    """How many elements the samples have, by their number; of some of them where there are many."""
    sizes = {index: _elements(dataset[index]) for index in _spread(samples, SAME_SIZE)}
    if len(set(sizes.values())) > 1:
        sizes |= {index: _elements(dataset[index]) for index in _spread(samples, MEASURED) if index not in sizes}
    return sizes


def _spread(samples: int, most: int) -> list[int]:
    return [i * samples // most for i in range(most)] if samples > most else list(range(samples))


def _elements(sample: Any) -> float:
    return float(sum(map(_elements_of_leaf, leaves(sample))))


def _elements_of_leaf(leaf: Any) -> int:
    if hasattr(leaf, "shape"):  # a tensor, or an array of another library's
        return math.prod(leaf.shape)
    return len(leaf) if hasattr(leaf, "__len__") else 1


def _is_batched(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0


def _resized(tensor: Tensor, n: int) -> Tensor:
    """``n`` samples in memory of their own, no more, with the strides of ``tensor`` (channels_last stays it)."""
    whole, rest = divmod(n, len(tensor))
    parts = [tensor.detach()] * whole + [tensor.detach()[:rest]] * (rest > 0)
    resized = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    return resized.requires_grad_(tensor.requires_grad)


def _unshared(sample: Any) -> Any:
    """A copy of ``sample`` as far as lists, mappings and tuples go; what they hold is the same."""
    if type(sample) is tuple:
        return tuple(map(_unshared, sample))
    if not isinstance(sample, (dict, list)):
        return sample
    copied = copy.copy(sample)
    for key, value in list(copied.items() if isinstance(copied, dict) else enumerate(copied)):
        if isinstance(value, (dict, list, tuple)):
            copied[key] = _unshared(value)
    return copied


def _short(value: Any) -> Any:
    """``value``, or its type where its repr may be of any length."""
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__
