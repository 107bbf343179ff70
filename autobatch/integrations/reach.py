"""What a function of the user's trains without having been given it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer


def trained(items: Iterable[Any]) -> list[Any]:
    """Those of ``items`` that training changes: modules, optimizers, schedulers and scalers."""
    kinds = (nn.Module, Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    return [item for item in items if isinstance(item, kinds)]


def around(function: Callable[..., Any]) -> Iterator[Any]:
    """What ``function`` uses from outside of it, by name."""
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        yield from names.nonlocals.values()
        yield from names.globals.values()
