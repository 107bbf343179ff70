"""What every target shares: the options, and how a model is made ready for training."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autobatch.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autobatch.probe.workload import Workload

OPTIMIZERS = ("adamw", "adam", "sgd", "adamw-fused", "adam-fused", "sgd-fused")
_LEARNING_RATE = 1e-4
_MOMENTUM = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the command line says about the model and its training. None is what was not said."""

    seq_len: int | None = None
    task: str | None = None
    image_size: int | None = None
    optimizer: str | None = None
    precision: str | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    mode: str | None = None
    effective_batch_size: int | None = None


class Target(Protocol):
    """Builds a workload on the device it is given, such as ``"cuda:0"``."""

    @property
    def title(self) -> str:
        """What is probed, for a person."""

    def import_modules(self) -> None:
        """Imports what building needs, so that forks of this process need not. Touches no device."""

    def __call__(self, device: str) -> Workload: ...


def refuse(options: ModelOptions, option: str, whom: str) -> None:
    """Raises InvalidArgumentError if ``option`` was given, since it means nothing to ``whom``."""
    if (value := getattr(options, option)) is not None:
        raise InvalidArgumentError(option, value, f"left out: it means nothing to {whom}")


def nearest(name: str, known: Iterable[str], *, count: int = 5, few: bool = False) -> str:
    """The names in ``known`` that look most like ``name``, as one string; where none does and they are few, all."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    every = f"; there are {', '.join(sorted(names))}" if few and names else ""
    return ", ".join(near) or f"none that looks like it{every}"


def trained(
    model: nn.Module,
    sample: Callable[[int], Any],
    options: ModelOptions,
    *,
    name: str,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    max_grad_norm: float | None = None,
) -> Workload:
    """The workload that trains a built-in ``model`` as ``options`` say."""
    from autobatch.probe.workload import Workload

    if options.grad_checkpointing:
        checkpoint_activations(model)
    if options.compile:
        model.compile()
        sample = _with_dynamic_batch(sample)
    optimizer = make_optimizer(options.optimizer or OPTIMIZERS[0], model)
    return Workload(
        model,
        optimizer,
        loss_fn,
        sample,
        precision=options.precision,
        max_grad_norm=max_grad_norm,
        accumulate=options.effective_batch_size is not None,
        mode=options.mode or "train",
        name=name,
    )


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over the parameters of ``model`` that are trained."""
    import torch

    kind, _, form = name.partition("-")
    fused = True if form == "fused" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=_MOMENTUM, fused=fused)
    return (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(parameters, lr=_LEARNING_RATE, fused=fused)


def checkpoint_activations(model: nn.Module) -> None:
    """Turns on what transformers and timm call gradient checkpointing.

    Raises:
        InvalidArgumentError: if the model has no such thing.
    """
    enable: Callable[[], None] | None = None
    # transformers 5 renamed its method and warns about the old name; timm has a third.
    for method in ("activation_checkpointing_enable", "gradient_checkpointing_enable", "set_grad_checkpointing"):
        enable = enable or getattr(model, method, None)
    try:
        if enable is not None:
            enable()
            return
    except (AssertionError, ValueError) as exc:  # how timm and transformers say that a model cannot
        raise _no_checkpointing(model) from exc
    raise _no_checkpointing(model)


def _no_checkpointing(model: nn.Module) -> InvalidArgumentError:
    return InvalidArgumentError("grad_checkpointing", True, f"left out: {type(model).__name__} has no checkpointing")


def _with_dynamic_batch(sample: Callable[[int], Any]) -> Callable[[int], Any]:
    """``sample`` with the first dimension marked as the one that varies: one compilation instead of one a size."""
    from torch import Tensor, _dynamo

    def marked(n: int) -> Any:
        batch = sample(n)
        for value in batch.values() if isinstance(batch, dict) else batch:
            if isinstance(value, Tensor):
                _dynamo.maybe_mark_dynamic(value, 0)
        return batch

    return marked
