"""Lightning: ``autobatch.tune(trainer, model, data)`` before ``fit()``, or the callback :class:`AutoBatch` amid it.

::

    trainer = lightning.Trainer(callbacks=[AutoBatch(effective_batch_size=256)])
    trainer.fit(model, loader)

A trial is training by the trainer's own loops: its precision, its clipping, its optimizer, the module's hooks. The
trainers of ``lightning`` and of ``pytorch_lightning`` are both known.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autobatch.integrations.lightning.checks import check_idle, check_trainer, fit_arguments
from autobatch.integrations.lightning.loaders import EVALUATION_NAMES, TRAINING_NAMES, flattened, holders_of, present
from autobatch.integrations.lightning.trials import PACKAGES, kept, package_of, part, silence
from autobatch.integrations.lightning.tuning import Numbers, last_window_note, loaders_of, numbers_of, plan_in
from autobatch.integrations.lightning.window import weigh_all, weigh_earlier
from autobatch.integrations.missing import needed
from autobatch.integrations.sizes import check_options
from autobatch.probe.state import preserved
from autobatch.result import BatchSizeResult
from autobatch.training.plan import AccumulationPlan

_NAMES = (*TRAINING_NAMES, *EVALUATION_NAMES)
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def handles(trainer: Any) -> bool:
    """Whether ``trainer`` is a ``Trainer`` of ``lightning.pytorch`` or of ``pytorch_lightning``."""
    return package_of(trainer) is not None


def tune(
    trainer: Any,
    model: Any,
    data: Any,
    *,
    optimizer: Any = None,
    loss_fn: Any = None,
    effective_batch_size: int | None = None,
    **find_options: Any,
) -> BatchSizeResult:
    """As :func:`autobatch.tune`: ``fit()`` is begun, and left before its first batch.

    ``data`` is a training loader, a pair of it and evaluation loaders, a LightningDataModule, or None where the module
    makes its loaders. Loaders that a hook makes must follow an attribute ``batch_size`` of the module, of the data
    module or of their hparams; those of evaluation may follow ``eval_batch_size`` or ``val_batch_size``.

    The hooks ``prepare_data``, ``setup``, ``configure_optimizers`` and ``teardown`` are called, and again by the real
    ``fit()``. A process group that ``fit()`` has made stays. What callbacks hold is not in the trials, and the last
    window of an epoch is left to Lightning; the callback :class:`AutoBatch` takes care of both.

    Raises:
        InvalidArgumentError: an argument is wrong; nothing was touched.
        UnsupportedTrainerError: the trainer cannot be tuned; all is as it was.
        DoesNotFitError: not even one sample fits.
    """
    fit = fit_arguments(trainer, model, data, optimizer=optimizer, loss_fn=loss_fn)
    module = getattr(model, "_orig_mod", model)
    check_idle(trainer)
    check_trainer(trainer, module, effective_batch_size)
    with _untouched(trainer, model, fit):
        names = present(_NAMES, holders_of(module, fit.get("datamodule")))
        stop = _Stop(effective_batch_size, find_options, names, part(trainer, "utilities.exceptions"))
        silence(trainer)
        trainer.callbacks = [stop]
        module.configure_callbacks = list  # those of the module are the user's too
        trainer.fit(model, **fit)
    assert stop.numbers is not None, "fit() has called the callback, or raised"
    result, note = stop.numbers.give_to(trainer), last_window_note(trainer, stop.numbers)
    return result if note is None else replace(result, notes=(*result.notes, note))


def _callback_class() -> Any:
    """``Callback`` of the package that is in use, of both where both are; of the first that is here, where none is."""
    used = [package for package in PACKAGES if sys.modules.get(package) is not None]
    found: list[Any] = []
    for package in used or PACKAGES:
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(package).Callback)
        if found and not used:
            break
    if not found:
        raise ImportError("neither lightning nor pytorch_lightning is installed")
    return type("Callback", tuple(found), {})


if TYPE_CHECKING:
    _Callback = Any
else:
    with needed("lightning"):
        _Callback = _callback_class()


class AutoBatch(_Callback):  # type: ignore[misc]  # its base is known when it is imported
    """Finds the largest micro-batch when ``fit()`` begins, and goes on to train with it.

    The trainer's ``accumulate_grad_batches`` and the batch sizes of its loaders are set, whoever made them; those of
    evaluation to the largest that fits there. All else is as it was. Where ``configure_optimizers()`` has asked for
    ``trainer.estimated_stepping_batches``, it is called once more, for there is another number of steps now.

    In a last window of an epoch that is shorter than the others, gradients are weighted by its samples, which Lightning
    does not do (Lightning#19987): exact for losses that are a mean over samples. A ``fit()`` that goes on from a
    checkpoint takes the numbers of the checkpoint, unless ``effective_batch_size`` or the ranks have changed.

    In a process group of several ranks all search together. With ``strategy="ddp_spawn"`` the result is that of the
    processes, and does not come back.

    Args:
        effective_batch_size: samples of an optimizer step over all ranks, a multiple of these; None for the largest
            that fits and no accumulation.
        find_options: further arguments of :func:`autobatch.find`, such as ``headroom=0.1``.

    Raises:
        InvalidArgumentError: an argument is wrong.
        UnsupportedTrainerError: by ``fit()``, for a trainer that cannot be tuned.
        DoesNotFitError: by ``fit()``, if not even one sample fits.
    """

    def __init__(self, effective_batch_size: int | None = None, **find_options: Any) -> None:
        check_options(effective_batch_size, find_options)
        super().__init__()
        self.result: BatchSizeResult | None = None
        """What was found, once ``fit()`` has begun. ``environment["accumulation"]`` has the plan."""
        self._effective_batch_size, self._find_options = effective_batch_size, find_options
        self._plan: AccumulationPlan | None = None
        self._resumed: BatchSizeResult | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check_trainer(trainer, pl_module, self._effective_batch_size)
        lasting = bool(trainer.reload_dataloaders_every_n_epochs)
        training, evaluation = loaders_of(trainer, _NAMES, lasting=lasting)
        resumed, self._resumed = self._resumed, None
        if resumed is not None and self._is_asked_for(plan_in(resumed), trainer.world_size):
            numbers = Numbers(result=resumed, plan=plan_in(resumed), training=training, evaluation=evaluation)
        else:
            numbers = numbers_of(
                trainer,
                training,
                evaluation,
                effective_batch_size=self._effective_batch_size,
                find_options=self._find_options,
                lasting=lasting,
            )
        self.result, self._plan = numbers.give_to(trainer), numbers.plan
        _forget_estimate(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._plan is not None:
            weigh_earlier(trainer, self._plan)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._plan is not None:
            weigh_all(trainer, self._plan, optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.result is None else {"result": self.result.to_json(indent=None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = BatchSizeResult.from_json(state_dict["result"])

    def _is_asked_for(self, plan: AccumulationPlan, world_size: int) -> bool:
        asked = self._effective_batch_size
        return plan.world_size == world_size and asked in (None, plan.effective_batch_size)


class _Stop(_Callback):  # type: ignore[misc]
    """Searches when ``fit()`` begins, and ends it."""

    def __init__(
        self,
        effective_batch_size: int | None,
        find_options: Mapping[str, Any],
        names: Sequence[str],
        exceptions: Any,
    ) -> None:
        super().__init__()
        self.numbers: Numbers | None = None
        self._effective_batch_size, self._find_options = effective_batch_size, find_options
        self._names, self._end = names, exceptions._TunerExitException

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        training, evaluation = loaders_of(trainer, self._names, lasting=True)
        self.numbers = numbers_of(
            trainer,
            training,
            evaluation,
            effective_batch_size=self._effective_batch_size,
            find_options=self._find_options,
            lasting=True,
        )
        raise self._end()


@contextlib.contextmanager
def _untouched(trainer: Any, model: Any, fit: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``fit()`` may begin; afterwards all that it was given is as it was, and it has printed nothing."""
    loaders = [*flattened(fit.get("train_dataloaders")), *flattened(fit.get("val_dataloaders"))]
    owners = [*loaders, *([fit["datamodule"]] if "datamodule" in fit else [])]
    generators = [item.generator for each in loaders for item in (each, each.sampler) if hasattr(item, "generator")]
    known = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in known]
    with preserved((model, generators), str(trainer.strategy.root_device)), kept(trainer, *owners):
        try:
            for logger in known:
                logger.setLevel(max(logging.WARNING, logger.level))
            yield
        finally:
            for logger, level in zip(known, levels, strict=True):
                logger.setLevel(level)


def _forget_estimate(trainer: Any) -> None:
    """Where ``configure_optimizers()`` has asked how many steps there will be, lets it ask again."""
    fit_loop = trainer.fit_loop
    if fit_loop._combined_loader is None:
        return
    fit_loop._data_fetcher.teardown()
    fit_loop._data_fetcher = fit_loop._combined_loader = None
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.setup_precision_plugin()
