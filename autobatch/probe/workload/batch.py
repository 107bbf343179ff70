"""What a batch is made of: tensors in mappings, sequences and dataclasses, and what a model makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import InvalidArgumentError


def move(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor in it on ``device``: tensors, mappings, sequences and dataclasses of them."""
    return mapped(batch, lambda part: callable(getattr(part, "to", None)), lambda part: part.to(device))


def mapped(batch: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """``batch`` built anew, with ``change`` made to every part that ``is_leaf``; what else it holds stays as it is."""
    if is_leaf(batch):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, is_leaf, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, is_leaf, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(value, is_leaf, change) for value in batch)
    if _is_record(batch):
        names = [f.name for f in dataclasses.fields(batch) if f.init]
        return dataclasses.replace(batch, **{name: mapped(getattr(batch, name), is_leaf, change) for name in names})
    return batch


def leaves(batch: Any) -> Iterator[Any]:
    """Everything in ``batch`` that is no mapping, sequence or dataclass."""
    if isinstance(batch, Mapping):
        parts: Any = batch.values()
    elif isinstance(batch, (tuple, list)):
        parts = batch
    elif _is_record(batch):
        parts = (getattr(batch, f.name) for f in dataclasses.fields(batch))
    else:
        yield batch
        return
    for part in parts:
        yield from leaves(part)


def tensors(batch: Any) -> list[Tensor]:
    """The tensors in ``batch``."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returned that computes it itself."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() > 0:
        raise InvalidArgumentError("loss_fn", None, "given when the model does not return a scalar loss itself")
    return found


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)
