"""Accelerate: the largest batch of a loop written by hand around an ``Accelerator``.

::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    autobatch.tune(accelerator, model, loader, optimizer=optimizer, loss_fn=loss_fn, effective_batch_size=512)
    for batch in loader:
        with accelerator.accumulate(model):
            ...

The prepared loader and ``accelerator.gradient_accumulation_steps`` get the numbers, so the loop must ask
``accelerator.accumulate`` when to step. Whatever is computed from ``len(loader)``, such as a schedule, comes after.

Accelerate divides each loss by the number of steps. A full window of equal micro-batches has the gradient of its whole
batch. Where the loss is a mean over something of which samples have more or less, such as tokens, it is a mean of
means; and the last window of an epoch, if it is shorter, counts less than it should. :class:`autobatch.Accumulator`
has neither fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.accelerate.executable import find_executable_batch_size
from autobatch.integrations.loaders import Source, set_batch_size, source_of
from autobatch.integrations.missing import needed
from autobatch.integrations.sizes import searched, share_of
from autobatch.integrations.workload import TrainerWorkload
from autobatch.probe.workload.arguments import check_functions
from autobatch.probe.workload.forward import device_of, forward
from autobatch.result import BatchSizeResult

with needed("accelerate"):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderShard
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import send_to_device

__all__ = ["find_executable_batch_size", "handles", "tune"]


def handles(trainer: Any) -> bool:
    """Whether ``trainer`` is an Accelerator."""
    return isinstance(trainer, Accelerator)


def tune(
    trainer: Accelerator,
    model: Any,
    data: Any,
    *,
    optimizer: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    effective_batch_size: int | None = None,
    **find_options: Any,
) -> BatchSizeResult:
    """Gives the loader the largest micro-batch that fits, and the accelerator its accumulation steps.

    A trial runs forward under the model that ``prepare()`` returned, with its autocast, then ``accelerator.backward``,
    ``optimizer.step()`` and ``optimizer.zero_grad()``, two micro-batches of them where gradients accumulate. What else
    a loop does amid training is not known here. Clipping needs no memory to speak of; for an averaged copy of the
    weights, an evaluation or the like leave room with ``headroom``.

    Args:
        trainer: the accelerator.
        model, data, optimizer: as ``accelerator.prepare()`` returned them; a list of optimizers, if there are several.
        loss_fn: ``loss_fn(output, target)`` for batches that are a pair, else ``loss_fn(output, batch)``; None where
            the model returns its loss.
        effective_batch_size: samples of an optimizer step over all ranks; None for no accumulation.
        find_options: of :func:`autobatch.find`.

    Raises:
        InvalidArgumentError: an argument is wrong.
        UnsupportedTrainerError: the accelerator shards the model, hands it to another engine or has begun an epoch, or
            the loader cannot be given a batch size.
        DoesNotFitError: not even one sample fits.
    """
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    _check_prepared(model, data, optimizers)
    check_functions(loss_fn=loss_fn)
    _check_way(trainer, model)
    source = source_of(data, "the loader")
    _check_idle(trainer)
    _check_trains(model, optimizers)
    share = share_of(effective_batch_size, trainer.num_processes)
    workload = _Loop(trainer, model, source, optimizers, loss_fn, share)
    result, plan = searched(
        workload,
        effective_batch_size=effective_batch_size,
        world_size=trainer.num_processes,
        find_options=find_options,
    )
    splits = getattr(data.batch_sampler, "split_batches", False)
    set_batch_size(data, plan.micro_batch_size * (trainer.num_processes if splits else 1))
    trainer.gradient_accumulation_steps = plan.steps
    trainer.step = 0  # the first window begins with the next batch
    each = " of a rank" if trainer.num_processes > 1 else ""
    note = (
        f"The batch size{each} was set on the loader, {plan.micro_batch_size}, and gradient_accumulation_steps on the "
        f"accelerator, {plan.steps}."
    )
    return replace(result, notes=(*result.notes, note))


class _Loop(TrainerWorkload):
    """Steps as a loop around ``accelerator.accumulate`` takes them."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        source: Source,
        optimizers: Sequence[AcceleratedOptimizer],
        loss_fn: Callable[..., Tensor] | None,
        share: int | None,
    ) -> None:
        known = [item for item in (*optimizers, accelerator.scaler, loss_fn) if item is not None]
        super().__init__(
            model, source, self._window, share=share, stateful=known, identity=[str(accelerator.mixed_precision)]
        )
        self._accelerator, self._optimizers, self._loss = accelerator, optimizers, loss_fn

    def _window(self, batches: Sequence[Any]) -> None:
        accelerator, device = self._accelerator, device_of(self.model)
        before = accelerator.sync_gradients
        try:
            for number, drawn in enumerate(batches, 1):
                accelerator.sync_gradients = number == len(batches)
                batch = send_to_device(drawn, device)
                output, loss = forward(self.model, self._loss, batch, precision=None, device=device)
                # As the variables of a loop, which keep the output of a step until the next forward pass has ended.
                self._last = (batch, output, loss)
                accelerator.backward(loss)
                for optimizer in self._optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        finally:
            accelerator.sync_gradients = before


def _check_prepared(model: Any, loader: Any, optimizers: Sequence[Any]) -> None:
    wanted = "as accelerator.prepare() returned it: prepare it first"
    if not isinstance(model, nn.Module) or not getattr(model, "_is_accelerate_prepared", False):
        raise InvalidArgumentError("model", _kind(model), wanted)
    for optimizer in optimizers or [None]:
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise InvalidArgumentError("optimizer", _kind(optimizer), wanted)
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        source_of(loader, "the loader")
    if not getattr(loader, "_is_accelerate_prepared", False):
        raise InvalidArgumentError("data", _kind(loader), f"a loader {wanted}; skip batches of it after tune()")
    if not isinstance(loader, DataLoaderShard):
        raise UnsupportedTrainerError(
            f"the loader is a {type(loader).__name__}, with which one rank draws for all; every rank must draw for "
            "itself (dispatch_batches=False)"
        )


def _check_trains(model: nn.Module, optimizers: Sequence[Any]) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not any(id(each) in known for group in optimizer.param_groups for each in group["params"]):
            raise InvalidArgumentError("optimizer", _kind(optimizer), "one that has parameters of the model")


def _check_way(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuses what a rank cannot try by itself."""
    way = accelerator.distributed_type.value
    if way != "NO" and not way.startswith("MULTI_"):
        raise UnsupportedTrainerError(
            f"the accelerator runs the model with {way}; a rank must be able to step it by itself, as it can in one "
            "process or in DistributedDataParallel. A function that builds the model, which autobatch.find() takes, "
            "may shard it with FSDP2"
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise UnsupportedTrainerError(
            "the accelerator has a parallelism_config; its ranks must share out nothing but the samples"
        )
    if isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel):
        raise UnsupportedTrainerError(
            "the model is compiled around DistributedDataParallel; several ranks need one that is not compiled"
        )


def _check_idle(accelerator: Accelerator) -> None:
    state = accelerator.gradient_state
    if state.in_dataloader:
        raise UnsupportedTrainerError(
            "a loader of the accelerator is being iterated over, or was left amid an epoch; tune() must come before "
            "the loop or between two epochs"
        )
    if accelerator.step % state.num_steps:
        raise UnsupportedTrainerError(
            f"the accelerator has accumulated {accelerator.step % state.num_steps} of {state.num_steps} steps; tune() "
            "must come where no window is open"
        )


def _kind(value: Any) -> str | None:
    return None if value is None else type(value).__name__
