"""Cutting a batch into micro-batches along its first dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from autobatch.errors import InvalidArgumentError
from autobatch.probe.workload.batch import mapped, tensors


def samples_of(batch: Any) -> int:
    """How many samples ``batch`` has: the size of its tensors' first dimension.

    Raises:
        InvalidArgumentError: if it has no tensor with a dimension, or tensors that disagree; says of which shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _named(batch) if tensor.dim()}
    sizes = sorted({shape[0] for shape in shapes.values()})
    if not sizes:
        raise InvalidArgumentError(
            "batch", type(batch).__name__, "one with tensors whose first dimension is the sample"
        )
    if len(sizes) > 1:
        said = ", ".join(f"{name or 'batch'} {shape}" for name, shape in shapes.items())
        raise InvalidArgumentError(
            "batch", f"tensors of shapes {said}", "one whose tensors have the same number of samples along dim 0"
        )
    return sizes[0]


def micro_batches(batch: Any, samples: int, most: int) -> Iterator[Any]:
    """``batch`` of ``samples`` in as few parts of at most ``most`` samples as there can be, alike to one sample.

    Tensors are views. Lists, tuples and arrays with an item for each sample that hold no tensor (texts, names) are cut
    too; what else there is goes into every part as it is. A list of tensors is not cut between them: each is taken to
    have the samples along its own first dimension.
    """
    if 0 < samples <= most:
        yield batch
        return
    for part in parts_of(samples, most):
        yield _cut(batch, samples, part)


def parts_of(samples: int, most: int) -> Iterator[slice]:
    """Where ``samples`` are cut into as few parts of at most ``most`` as there can be, alike to one sample."""
    parts, begin = -(-samples // most), 0
    for part in range(parts):
        end = begin + samples // parts + (part < samples % parts)
        yield slice(begin, end)
        begin = end


def _cut(batch: Any, samples: int, part: slice) -> Any:
    def is_leaf(item: Any) -> bool:
        return isinstance(item, Tensor) or _is_column(item, samples)

    def change(item: Any) -> Any:
        return item if isinstance(item, Tensor) and not item.dim() else item[part]

    return mapped(batch, is_leaf, change)


def _is_column(item: Any, samples: int) -> bool:
    """Whether ``item`` has something for each sample, and is no part of a batch's own structure."""
    if isinstance(item, (list, tuple)):
        return len(item) == samples and not hasattr(item, "_fields") and not tensors(item)
    shape = getattr(item, "shape", None)  # an array of NumPy
    return not isinstance(item, Tensor) and isinstance(shape, tuple) and bool(shape) and shape[0] == samples


def _named(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``batch`` by where they are: ``['labels']``, ``[0]``, ``.x``."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from _named(part, f"{name}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, part in enumerate(batch):
            yield from _named(part, f"{name}[{index}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _named(getattr(batch, field.name), f"{name}.{field.name}")
