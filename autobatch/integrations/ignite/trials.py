"""What an engine of Ignite trains, as the probe runs it: a process function as it is, or steps of an accumulator."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.loaders import Source
from autobatch.integrations.reach import around, trained
from autobatch.integrations.workload import TrainerWorkload
from autobatch.probe.state import interrupts_deferred
from autobatch.probe.workload.forward import device_of
from autobatch.training.accumulator import Accumulator
from autobatch.training.plan import AccumulationPlan, plan_accumulation

if TYPE_CHECKING:
    from ignite.engine import Engine

_ITERATIONS = 64
"""A process function must step the optimizer within so many."""


class Windows(TrainerWorkload):
    """Steps of an accumulator, which gets the batch of an optimizer step from the loader at once."""

    def __init__(self, accumulator: Accumulator, model: Any, optimizer: Any, source: Source, share: int | None) -> None:
        if model is not None and model is not accumulator.model:
            raise InvalidArgumentError("model", type(model).__name__, "that of the accumulator, or None")
        for each in _listed(optimizer):
            if not any(each is known for known in accumulator.stateful):
                raise InvalidArgumentError("optimizer", type(each).__name__, "those of the accumulator, or None")
        super().__init__(
            accumulator.model,
            source,
            # Where the loader's batches are on the device that is probed, the rest of the window takes its memory.
            lambda batches: accumulator.rehearse(batches[:2]),
            share=share,
            holds_window=device_of(accumulator.model).type == "cpu",
            stateful=accumulator.stateful,
        )
        self._accumulator = accumulator

    def plan(self, effective_batch_size: int | None, fits: int, ranks: int) -> AccumulationPlan:
        """What the accumulator makes of a window."""
        return plan_accumulation(effective_batch_size=effective_batch_size, micro_batch_size=fits, world_size=ranks)

    def give(self, plan: AccumulationPlan) -> tuple[int, str]:
        """Sets the micro-batch; returns what the loader is to draw at once, and a sentence for a person."""
        if self._accumulator.windows:
            self._accumulator.micro_batch_size = plan.micro_batch_size
        else:
            self._accumulator.restart(plan.micro_batch_size)
        share = plan.effective_batch_size // plan.world_size
        return share, f"The accumulator's micro_batch_size was set to {plan.micro_batch_size}."


class Iterations(TrainerWorkload):
    """Iterations of an engine up to a step of the optimizer."""

    def __init__(
        self, engine: Engine, model: Any, optimizer: Any, loader: Any, source: Source, share: int | None
    ) -> None:
        if not isinstance(model, nn.Module):
            named = None if model is None else type(model).__name__
            raise InvalidArgumentError("model", named, "the module that the process function trains")
        self._optimizers = _listed(optimizer)
        for each in self._optimizers or [None]:
            if not isinstance(each, torch.optim.Optimizer):
                allowed = "the torch optimizer that the process function steps, or a list of them"
                raise InvalidArgumentError("optimizer", None if each is None else type(each).__name__, allowed)
        _check_wrapping(model)
        known = [*self._optimizers, *trained(around(engine._process_function))]
        super().__init__(model, source, self._iterate, share=share, stateful=known, identity=[engine._process_function])
        self._engine, self._loader = engine, loader
        self._count = torch.full((1,), _ITERATIONS + 1).share_memory_()  # trials may be in forks of this process

    def plan(self, effective_batch_size: int | None, fits: int, ranks: int) -> AccumulationPlan:
        """The only one that there is: how often the process function steps is its own.

        Raises:
            UnsupportedTrainerError: if it is not ``effective_batch_size``.
        """
        steps = int(self._count)
        effective = fits * steps * ranks if effective_batch_size is None else effective_batch_size
        size, rest = divmod(effective, steps * ranks)
        if rest:
            raise UnsupportedTrainerError(
                f"effective_batch_size={effective}: must be a multiple of {steps * ranks}, the iterations of all ranks "
                "after which the process function steps the optimizer"
            )
        if size > fits:
            raise UnsupportedTrainerError(
                f"effective_batch_size={effective} takes {size} samples at once, and {fits} is the most that fits, or "
                "that the data set has. This process function cannot be told to accumulate; "
                "autobatch.integrations.ignite.update(accumulator) is one that does"
            )
        return plan_accumulation(effective_batch_size=effective, micro_batch_size=size, world_size=ranks)

    def give(self, plan: AccumulationPlan) -> tuple[int, str]:
        """What the loader is to draw at once, and a sentence for a person."""
        return plan.micro_batch_size, "The process function is as it was."

    def _micro_batches(self, batch_size: int) -> int:
        return 1

    def _iterate(self, batches: Sequence[Any]) -> None:
        stepped: list[Any] = []
        hooks = [each.register_step_post_hook(lambda *said: stepped.append(said)) for each in self._optimizers]
        engine = self._engine
        try:
            with _borrowed(engine, self._loader), _alone(self.model):
                for iteration in range(1, _ITERATIONS + 1):
                    engine.state.iteration, engine.state.batch, engine.state.output = iteration, batches[0], None
                    engine.state.output = engine._process_function(engine, batches[0])
                    if stepped:
                        # The fewest: a scaler may have skipped some.
                        self._count.clamp_(max=iteration)
                        return
        finally:
            for hook in hooks:
                hook.remove()
        raise UnsupportedTrainerError(
            f"the process function did not step the optimizer that was given within {_ITERATIONS} iterations"
        )


@contextlib.contextmanager
def _borrowed(engine: Engine, loader: Any) -> Iterator[None]:
    """Inside, the engine is as amid a run, has no handlers, and may be changed."""
    before = dict(vars(engine))
    state = copy.copy(engine.state)
    state.metrics, state.times = dict(state.metrics), dict(state.times)
    state.epoch, state.epoch_length, state.dataloader = max(1, state.epoch), len(loader), loader
    engine.state, engine._event_handlers = state, defaultdict(list)
    try:
        yield
    finally:
        with interrupts_deferred():
            vars(engine).clear()
            vars(engine).update(before)


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Inside, DistributedDataParallel asks no other rank."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_forward_param_sync = model.require_forward_param_sync, False
    try:
        with model.no_sync():
            yield
    finally:
        model.require_forward_param_sync = before


def _check_wrapping(model: Any) -> None:
    if isinstance(model, DataParallel):
        raise UnsupportedTrainerError(
            "the model is in DataParallel, over several devices of one process; it must be on one, or in "
            "DistributedDataParallel"
        )
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise UnsupportedTrainerError(
            "the model is in DistributedDataParallel(static_graph=True), which learns from its first step; it must be "
            "left out"
        )


def _listed(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
