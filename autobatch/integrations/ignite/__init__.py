"""Ignite: the largest batch of an ``Engine`` that trains, and an update that accumulates exactly.

::

    accumulator = autobatch.Accumulator(model, optimizer, loss_fn, micro_batch_size=1)
    engine = Engine(update(accumulator))
    autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=512)
    engine.run(loader, max_epochs=3)

An engine knows no accumulation steps that could be set: those of ``create_supervised_trainer`` are fixed when it is
called. With :func:`update` in the place of its process function the loader draws the whole batch of an optimizer step,
and the accumulator runs it in micro-batches that fit. Every other process function gets a batch size alone. Whatever
is computed from ``len(loader)``, such as a schedule, comes after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.ignite.trials import Iterations, Windows
from autobatch.integrations.loaders import set_batch_size, source_of
from autobatch.integrations.missing import needed
from autobatch.integrations.sizes import check_options, searched, share_of
from autobatch.ranks import Ranks
from autobatch.result import BatchSizeResult
from autobatch.training.accumulator import Accumulator

with needed("ignite"):
    from ignite.engine import Engine, Events


def update(accumulator: Accumulator) -> Callable[[Engine, Any], float]:
    """A process function: each batch is an optimizer step, run in micro-batches; it returns the loss of that batch.

    The gradient is that of the whole batch, and a batch that runs out of memory is repeated in smaller micro-batches:
    see :class:`autobatch.Accumulator`. Among several ranks their batches are one.
    """
    return _Update(accumulator)


class _Update:
    def __init__(self, accumulator: Accumulator) -> None:
        if not isinstance(accumulator, Accumulator):
            raise InvalidArgumentError("accumulator", type(accumulator).__name__, "an autobatch.Accumulator")
        self.accumulator = accumulator

    def __call__(self, engine: Engine, batch: Any) -> float:
        return float(self.accumulator.step(batch).loss)


class AutoBatch:
    """A handler that calls :func:`tune` when a run starts.

    ::

        AutoBatch(model, optimizer, loader, effective_batch_size=512).attach(engine)
        engine.run(loader, max_epochs=3)

    It is to be attached before handlers that ask for the length of an epoch. Later runs of the engine keep the sizes.

    Args:
        model, optimizer, loader: as for :func:`tune`; the engine must be run with this loader.
        effective_batch_size: samples of an optimizer step over all ranks; None for the largest that fits.
        find_options: of :func:`autobatch.find`.
    """

    result: BatchSizeResult | None = None
    """What was found, once a run has started."""

    def __init__(
        self, model: Any, optimizer: Any, loader: Any, effective_batch_size: int | None = None, **find_options: Any
    ) -> None:
        check_options(effective_batch_size, find_options)
        self._model, self._optimizer, self._loader = model, optimizer, loader
        self._effective_batch_size, self._find_options = effective_batch_size, find_options

    def attach(self, engine: Engine) -> None:
        """Lets the next run of ``engine`` start with it."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.result is not None:
            return
        if engine.state.dataloader is not self._loader:
            raise UnsupportedTrainerError(
                f"the engine runs over another {type(engine.state.dataloader).__name__} than the one that is tuned"
            )
        self.result = tune(
            engine,
            self._model,
            self._loader,
            optimizer=self._optimizer,
            effective_batch_size=self._effective_batch_size,
            **self._find_options,
        )


def handles(trainer: Any) -> bool:
    """Whether ``trainer`` is an Engine."""
    return isinstance(trainer, Engine)


def tune(
    trainer: Engine,
    model: Any,
    data: Any,
    *,
    optimizer: Any = None,
    loss_fn: Any = None,
    effective_batch_size: int | None = None,
    **find_options: Any,
) -> BatchSizeResult:
    """Gives the loader its batch size, and the accumulator of :func:`update` its micro-batch.

    A trial calls the process function, with a state as amid a run and without handlers, until the optimizer has stepped
    once. An evaluation, or weights that a handler averages, are not known here: leave room with ``headroom``.

    Args:
        trainer: an engine that trains.
        model, optimizer: what its process function trains; a list of optimizers, if there are several. They may be left
            out for :func:`update`, whose accumulator has them.
        data: the loader that the engine will run over. Each rank has its own, with the same number of samples.
        loss_fn: left out; the process function knows it.
        effective_batch_size: samples of an optimizer step over all ranks; None for the largest that fits at once.
        find_options: of :func:`autobatch.find`.

    Raises:
        InvalidArgumentError: an argument is wrong.
        UnsupportedTrainerError: the engine is running, the loader cannot be given a batch size, or the process function
            is not :func:`update` and the effective batch does not fit at once.
        DoesNotFitError: not even one sample fits.
    """
    if loss_fn is not None:
        raise InvalidArgumentError("loss_fn", loss_fn, "left out: the process function knows it")
    if data is None:
        raise InvalidArgumentError("data", None, "the loader that the engine will run over")
    source = source_of(data, "the loader")
    _check_idle(trainer)
    ranks, length = Ranks.here().size, len(data)
    share = share_of(effective_batch_size, ranks)
    workload: Windows | Iterations
    if isinstance(trainer._process_function, _Update):
        workload = Windows(trainer._process_function.accumulator, model, optimizer, source, share)
    else:
        workload = Iterations(trainer, model, optimizer, data, source, share)
    result, plan = searched(
        workload,
        effective_batch_size=effective_batch_size,
        world_size=ranks,
        find_options=find_options,
        plan_of=lambda fits: workload.plan(effective_batch_size, fits, ranks),
    )
    size, note = workload.give(plan)
    set_batch_size(data, size)
    if _goes_on(trainer) and trainer.state.epoch_length == length:
        trainer.state.epoch_length = len(data)  # a run that has just started has asked the loader already
    return replace(result, notes=(*result.notes, f"{note} The loader's batch size{_each(ranks)} was set to {size}."))


def _check_idle(engine: Engine) -> None:
    if engine._dataloader_iter is not None or (_goes_on(engine) and engine.state.iteration):
        raise UnsupportedTrainerError(
            f"the engine is amid a run, at iteration {engine.state.iteration}; tune() must come before it, and a run "
            "that goes on keeps the sizes that it began with"
        )


def _goes_on(engine: Engine) -> bool:
    """Whether the engine has begun a run, or will go on with one when it is run."""
    state = engine.state
    has_an_end = state.max_epochs is not None or getattr(state, "max_iters", None) is not None
    return has_an_end and not engine._is_done(state)


def _each(ranks: int) -> str:
    return "" if ranks == 1 else " on each rank"
