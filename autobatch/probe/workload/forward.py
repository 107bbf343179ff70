"""One forward pass and its loss: what a batch means to a model, and an output to a loss function."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autobatch.probe.workload.arguments import AUTOCAST_DTYPES
from autobatch.probe.workload.batch import loss_of


def forward(
    model: nn.Module, loss_fn: Callable[..., Tensor] | None, batch: Any, *, precision: str | None, device: torch.device
) -> tuple[Any, Tensor]:
    """The output and the loss of ``batch``, which is on ``device``.

    A mapping is given to the model as keywords; with ``loss_fn`` a pair is ``(input, target)``; without, a tuple is
    given as positional arguments; anything else is the model's one argument. ``precision`` is ``"bf16"`` or ``"fp16"``
    for autocast.
    """
    with _autocast(precision, device):
        output = _output(local(model), batch, keeps_target=loss_fn is None)
        if loss_fn is None:
            return output, loss_of(output)
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        return output, loss_fn(output, batch[1] if is_pair else batch)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer is; the host for a model that has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def local(model: nn.Module) -> nn.Module:
    """``model`` without DistributedDataParallel around it, which would wait for other ranks in every backward pass.

    Its buckets were allocated when it was made, so memory is as in training; with ``gradient_as_bucket_view`` a trial
    needs more, by one copy of the gradients. Its hooks do nothing unless its own forward was called.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def _output(model: nn.Module, batch: Any, *, keeps_target: bool) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    return model(*batch) if keeps_target else model(batch[0])


def _autocast(precision: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision not in AUTOCAST_DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
