"""Steps of a Lightning trainer as trials run them: its own loops on the batches they are given, and nobody is told.

Nothing of the library is imported here by name: it comes from the package in which the trainer's class is written.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autobatch.integrations.lightning.loaders import Loaders
from autobatch.integrations.workload import TrainerWorkload
from autobatch.probe.state import interrupts_deferred

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""One library under two names, of which each knows its own classes alone."""

_ROOTS = ("lightning", "pytorch_lightning", "lightning_fabric")


def package_of(trainer: Any) -> str | None:
    """The package whose ``Trainer`` this is; None for anything else."""
    for cls in type(trainer).__mro__:
        for package in PACKAGES:
            if cls.__name__ == "Trainer" and cls.__module__.startswith(f"{package}."):
                return package
    return None


def part(trainer: Any, name: str) -> ModuleType:
    """A module of the library, as ``trainer`` itself would import it."""
    return importlib.import_module(f"{package_of(trainer)}.{name}")


@contextlib.contextmanager
def kept(*roots: Any) -> Iterator[None]:
    """Inside, ``roots`` and what hangs from them of Lightning's own may change; afterwards each is as it was.

    That is a trainer with its loops and their progress, its connectors, its strategy. Attributes and the contents of
    lists and dictionaries are put back; what they hold besides (modules, optimizers, loggers, callbacks) is not.
    """
    restores = [_attributes_of(found) for found in _owned(roots)]
    try:
        yield
    finally:
        for restore in restores:
            restore()


@contextlib.contextmanager
def trials_of(trainer: Any, training: Loaders, evaluation: Loaders | None, share: int | None) -> Iterator[Trials]:
    """The steps of ``trainer``, which is inside ``fit()``, as a workload; afterwards it has run none.

    Callbacks, loggers and the profiler of the user hear nothing of them. What a step says to other ranks stays here,
    and DistributedDataParallel is left aside: a rank that runs out of memory would leave the others waiting.
    """
    strategy, fit_loop = trainer.strategy, trainer.fit_loop
    with kept(trainer):
        silence(trainer)
        trainer.callbacks = []
        # Schedules end, and a trial may have more steps than training.
        fit_loop.epoch_loop.update_lr_schedulers = _nothing
        fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
        if trainer.world_size > 1:
            strategy.reduce = _itself
            strategy.barrier = _nothing
        if isinstance(strategy.model, DistributedDataParallel):
            strategy.model = trainer.lightning_module
        combined = part(trainer, "utilities.combined_loader").CombinedLoader
        fit_loop._combined_loader = combined(training.made, "max_size_cycle")
        fit_loop.max_batches = max(len(training.flat[0]), 3)  # none of at most two micro-batches is an epoch's last
        if evaluation is not None:
            val_loop = fit_loop.epoch_loop.val_loop
            val_loop._combined_loader = combined(evaluation.flat, "sequential")
            val_loop._max_batches = [len(loader) for loader in evaluation.flat]
        yield Trials(trainer, training, evaluation, share)


def silence(trainer: Any) -> None:
    """Takes the user's loggers and profiler off ``trainer``, and gives it such as do nothing."""
    dummy = part(trainer, "loggers.logger").DummyLogger
    trainer.loggers = [dummy()] if trainer.loggers else []
    trainer.profiler = part(trainer, "profilers").PassThroughProfiler()


class Trials(TrainerWorkload):
    """Training by ``advance()`` of the trainer's epoch loop, evaluation by the step of its evaluation loop.

    Each trial is the start of an epoch: the module's own hooks of it are called, for steps may need what they set.
    """

    def __init__(self, trainer: Any, training: Loaders, evaluation: Loaders | None, share: int | None) -> None:
        self._trainer, module = trainer, trainer.lightning_module
        self._loop = trainer.fit_loop.epoch_loop
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        super().__init__(
            module,
            training.sources[0],
            self._run_training,
            share=share,
            evaluation=() if evaluation is None else evaluation.sources,
            evaluate=self._run_evaluation,
            stateful=[item for item in (*trainer.optimizers, *schedulers, scaler) if item is not None],
            identity=[str(trainer.precision), trainer.gradient_clip_val is not None],
        )
        self._begun: set[str] = set()
        self._modes = [(part_of_it, part_of_it.training) for part_of_it in module.modules()]
        self._trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._schedules = [(scheduler, deepcopy(scheduler.state_dict())) for scheduler in schedulers]
        self._restore_attributes = _attributes_of(module)

    def forget(self) -> None:
        super().forget()
        # What hooks and steps have set on the module, such as a list of outputs that an epoch's end would empty.
        self._restore_attributes()
        self._begun.clear()
        for parameter, requires_grad in self._trained:  # a step may have failed while it trained some of them only
            parameter.requires_grad_(requires_grad)
        for scheduler, state in self._schedules:
            scheduler.load_state_dict(deepcopy(state))

    def _run_training(self, batches: list[Any]) -> None:
        for module, mode in self._modes:  # Lightning leaves modules in the mode that they are in
            module.training = mode
        self._trainer.accumulate_grad_batches = len(batches)
        self._loop.batch_progress.reset_on_run()
        self._begin("on_fit_start", "on_train_start", "on_train_epoch_start")
        given = _Given(batches)
        try:
            while not given.done:
                self._loop.advance(given)
        finally:
            self._forget_results(self._loop, training=True)

    def _run_evaluation(self, batch: Any, number: int) -> None:
        val_loop = self._loop.val_loop
        val_loop._data_fetcher = _Given([])
        self._trainer.validating = True
        try:
            with torch.no_grad():
                if number == 0:
                    val_loop.batch_progress.reset_on_run()
                    self._call_hook("on_validation_model_zero_grad")
                    self._begin("on_validation_start", "on_validation_epoch_start")
                val_loop._evaluation_step(batch, 0, number, None)
        finally:
            self._forget_results(val_loop, training=False)
            self._trainer.training = True

    def _begin(self, *hooks: str) -> None:
        for hook in hooks:
            if hook not in self._begun:
                self._begun.add(hook)
                self._call_hook(hook)

    def _call_hook(self, hook: str) -> None:
        part(self._trainer, "trainer.call")._call_lightning_module_hook(self._trainer, hook)

    def _forget_results(self, loop: Any, *, training: bool) -> None:
        loop._results = type(loop._results)(training=training)
        self._trainer._logger_connector.reset_results()
        self._trainer._logger_connector.reset_metrics()


class _Given:
    """What a loop fetches batches from: those it was given. A batch that was fetched is the loop's alone."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches, self.fetched = batches, 0

    @property
    def done(self) -> bool:
        return not self._batches

    def __next__(self) -> tuple[Any, int, int]:
        self.fetched += 1
        return self._batches.pop(0), self.fetched - 1, 0


def _owned(roots: tuple[Any, ...]) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) not in found:
            found[id(item)] = item
            waiting += [value for value in vars(item).values() if _is_lightnings(value)]
    return list(found.values())


def _is_lightnings(value: Any) -> bool:
    if not hasattr(value, "__dict__") or isinstance(value, (type, enum.Enum, nn.Module)):
        return False
    written_in = [cls.__module__ for cls in type(value).__mro__]
    # A launcher knows the processes that it has started, and must go on to know them.
    return any(name.split(".")[0] in _ROOTS for name in written_in) and not any(".launchers." in n for n in written_in)


def _attributes_of(item: Any) -> Callable[[], None]:
    """A function that puts back the attributes of ``item``, and what is in those that are lists or the like."""
    attributes = dict(vars(item))
    containers = [value for value in (item, *attributes.values()) if isinstance(value, (dict, list, set))]
    contents = [(container, container.copy()) for container in containers]

    def restore() -> None:
        with interrupts_deferred():
            vars(item).clear()
            vars(item).update(attributes)
            for container, before in contents:
                container.clear()
                if isinstance(container, list):
                    container.extend(before)
                else:
                    container.update(before)

    return restore


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what would tell others."""


def _itself(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor
