"""What of a Lightning trainer cannot be tuned, said before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.lightning.loaders import flattened
from autobatch.integrations.lightning.trials import part
from autobatch.integrations.loaders import source_of
from autobatch.integrations.sizes import WHOLE_COMMAND, share_of

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy")


def fit_arguments(trainer: Any, model: Any, data: Any, *, optimizer: Any, loss_fn: Any) -> dict[str, Any]:
    """What ``trainer.fit(model, ...)`` is to be called with for ``data``.

    Raises:
        InvalidArgumentError: for an argument of tune() that a Lightning trainer does not take.
        UnsupportedTrainerError: for a loader that cannot be given a batch size.
    """
    for name, value in {"optimizer": optimizer, "loss_fn": loss_fn}.items():
        if value is not None:
            raise InvalidArgumentError(name, _kind(value), "left out: a LightningModule brings its own")
    if not isinstance(getattr(model, "_orig_mod", model), part(trainer, "core.module").LightningModule):
        name = f"{part(trainer, 'core.module').__name__.removesuffix('.core.module')}.LightningModule"
        raise InvalidArgumentError("model", _kind(model), f"a {name}, of the trainer's package")
    if isinstance(data, part(trainer, "core.datamodule").LightningDataModule):
        return {"datamodule": data}
    if isinstance(data, (list, tuple)) and len(data) != 2:
        allowed = "a DataLoader, a pair of a training loader and evaluation loaders, a LightningDataModule or None"
        raise InvalidArgumentError("data", f"{_kind(data)} of {len(data)}", allowed)
    training, evaluation = data if isinstance(data, (list, tuple)) else (data, None)
    if training is not None:
        source_of(training)
    for loader in flattened(evaluation):
        source_of(loader, "an evaluation loader")
    return {"train_dataloaders": training, "val_dataloaders": evaluation}


def check_trainer(trainer: Any, module: Any, effective_batch_size: int | None) -> None:
    """
    Raises:
        UnsupportedTrainerError: saying what is in the way, and what would be allowed.
    """
    share_of(effective_batch_size, trainer.world_size)
    for reason in (*_modes(trainer), *_strategies(trainer, module), *_steps(trainer, module, effective_batch_size)):
        raise UnsupportedTrainerError(reason)


def check_idle(trainer: Any) -> None:
    """
    Raises:
        UnsupportedTrainerError: if tune() cannot run ``fit()`` here and now.
    """
    if trainer.state.status == "running":
        raise UnsupportedTrainerError(
            f"the trainer is running {trainer.state.fn.value}(); it must be tuned before, or by the callback AutoBatch"
        )
    launcher = trainer.strategy.launcher
    if launcher is not None and "_MultiProcessingLauncher" in _classes(launcher):
        raise UnsupportedTrainerError(
            "the trainer starts its processes for fit() alone, and what is set in them is lost: it must be tuned by "
            "the callback AutoBatch, or take strategy='ddp'"
        )


def _modes(trainer: Any) -> Iterator[str]:
    if trainer.fast_dev_run:
        yield f"fast_dev_run={trainer.fast_dev_run!r} runs a few batches to find mistakes; it must be off to be tuned"
    if trainer.overfit_batches:
        yield f"overfit_batches={trainer.overfit_batches!r} trains on a few batches again and again; it must be 0"
    if trainer.limit_train_batches == 0:
        yield "limit_train_batches=0: nothing is trained; it must be larger"
    if type(trainer.val_check_interval) is int and trainer.check_val_every_n_epoch is not None:
        yield (
            f"val_check_interval={trainer.val_check_interval} counts micro-batches, of which there will be another "
            "number; it must be a fraction of an epoch"
        )
    for callback in trainer.callbacks:
        for name in ("GradientAccumulationScheduler", "BatchSizeFinder"):
            if name in _classes(callback):
                yield f"the callback {name} sets what is to be set here; one of the two must be left out"


def _strategies(trainer: Any, module: Any) -> Iterator[str]:
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if not _classes(strategy) & set(_SUPPORTED) or "XLA" in name:
        yield (
            f"{name} shards the model or knows no step apart from other ranks, and {WHOLE_COMMAND}. Supported: "
            f"{', '.join(_SUPPORTED)}"
        )
    elif trainer.world_size > 1:
        synchronised = getattr(strategy, "_layer_sync", None) is not None
        if synchronised or any(isinstance(each, nn.SyncBatchNorm) for each in module.modules()):
            yield f"SyncBatchNorm runs collectives amid a step, and {WHOLE_COMMAND}"
        if getattr(strategy, "_ddp_kwargs", {}).get("static_graph") and strategy.root_device.type != "cpu":
            yield "DDPStrategy(static_graph=True) notes the first backward pass, here a trial's; it must be off"


def _steps(trainer: Any, module: Any, effective_batch_size: int | None) -> Iterator[str]:
    if effective_batch_size is not None and not module.automatic_optimization:
        yield (
            f"automatic_optimization=False: the module steps by itself, so effective_batch_size={effective_batch_size} "
            "cannot be accumulated for it; it must be left out"
        )
    for step in ("training_step", "validation_step"):
        if "dataloader_iter" in inspect.signature(getattr(module, step)).parameters:
            yield f"{step}(dataloader_iter) fetches its batches by itself; it must take a batch"


def _classes(item: Any) -> set[str]:
    return {cls.__name__ for cls in type(item).__mro__}


def _kind(value: Any) -> str:
    return type(value).__name__
