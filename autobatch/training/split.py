"""Cutting a batch into micro-batches along its first dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from autobatch.errors import InvalidArgumentError
from autobatch.probe.batch import mapped, tensors


def samples_of(batch: Any) -> int:
    """How many samples ``batch`` has: the size of its tensors' first dimension.

    Raises:
        InvalidArgumentError: if it has no tensor with a dimension, or tensors that disagree; says of which shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors(batch) if tensor.dim()]
    sizes = sorted({shape[0] for shape in shapes})
    if not sizes:
        raise InvalidArgumentError(
            "batch", type(batch).__name__, "one with tensors whose first dimension is the sample"
        )
    if len(sizes) > 1:
        raise InvalidArgumentError(
            "batch", f"tensors of shapes {shapes}", "one whose tensors have the same number of samples along dim 0"
        )
    return sizes[0]


def micro_batches(batch: Any, samples: int, most: int) -> Iterator[Any]:
    """``batch`` of ``samples`` in as few parts of at most ``most`` samples as there can be, alike to one sample.

    Tensors are views. Lists with an item for each sample that hold no tensor (texts, names) are cut too; what else
    there is goes into every part as it is.
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
        return isinstance(item, Tensor) or (_is_column(item) and len(item) == samples)

    def change(item: Any) -> Any:
        return item if isinstance(item, Tensor) and not item.dim() else item[part]

    return mapped(batch, is_leaf, change)


def _is_column(item: Any) -> bool:
    return isinstance(item, list) and not tensors(item)
