"""tune(): one line for whichever trainer is about to run. Finds the integration that knows it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from autobatch.errors import AutobatchWarning, UnsupportedTrainerError
from autobatch.integrations.missing import needed
from autobatch.integrations.sizes import check_options
from autobatch.result import BatchSizeResult

GROUP = "autobatch.trainers"
"""Entry points of this group name an :class:`Integration`: a module or an object."""

_LIBRARIES = {
    "transformers": "transformers",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "accelerate": "accelerate",
    "ignite": "ignite",
}
"""The library in which a class of the trainer is written, and our integration of it."""


class Integration(Protocol):
    """What tune() asks of an integration: a module with these two functions is one."""

    def handles(self, trainer: Any) -> bool:
        """Whether this trainer is one it knows. Nothing is touched."""

    def tune(
        self,
        trainer: Any,
        model: Any,
        data: Any,
        *,
        optimizer: Any,
        loss_fn: Any,
        effective_batch_size: int | None,
        **find_options: Any,
    ) -> BatchSizeResult:
        """As :func:`tune`."""


def tune(
    trainer: Any,
    model: Any = None,
    data: Any = None,
    *,
    optimizer: Any = None,
    loss_fn: Any = None,
    effective_batch_size: int | None = None,
    **find_options: Any,
) -> BatchSizeResult:
    """Finds the largest micro-batch for ``trainer``, which is about to run, and gives it the numbers.

    Its batch size and its accumulation steps are set so that an optimizer step takes ``effective_batch_size`` samples
    over all ranks. All else is left as it was: weights, optimizer, random numbers, loggers, callbacks, files. What a
    step of the user's own changes in objects or tensors that are no part of the trainer or its modules is put back on
    the host alone. In a process group of several ranks all of them must call it.

    ========================  =====================================================================================
    ``trainer``               what else
    ========================  =====================================================================================
    transformers ``Trainer``  nothing: it has its model and its data
    Lightning ``Trainer``     ``model``, and ``data``: loaders, a list of training and evaluation loaders, a data
                              module, or None where the model makes its loaders. The callback ``AutoBatch`` of
                              :mod:`autobatch.integrations.lightning` does the same amid ``fit()``
    ``Accelerator``           ``model``, ``data`` (a loader) and ``optimizer`` as ``prepare()`` returned them, and
                              ``loss_fn`` where the model does not return its loss
    Ignite ``Engine``         ``model``, ``data`` (a loader) and ``optimizer``: what its process function trains
    ========================  =====================================================================================

    Other libraries join by an entry point of the group ``autobatch.trainers``: see :class:`Integration`.

    Args:
        trainer: a trainer that is not running.
        model, data, optimizer, loss_fn: what the trainer does not know by itself.
        effective_batch_size: samples of an optimizer step over all ranks, a multiple of these; None for the largest
            that fits and no accumulation.
        find_options: further arguments of :func:`~autobatch.find`, such as ``headroom=0.1``.

    Returns:
        the result of the search. ``environment["accumulation"]`` has the plan; notes say what was set.

    Warns:
        AutobatchWarning: of an effective batch without a divisor near what fits, or larger than the data set.

    Raises:
        InvalidArgumentError: an argument is wrong; nothing was touched.
        UnsupportedTrainerError: no integration knows the trainer, or it is set up in a way that cannot be tuned;
            nothing was touched.
        MissingDependencyError: the library of the trainer is there in part only.
        DoesNotFitError: not even one sample fits.
    """
    check_options(effective_batch_size, find_options)
    return _integration_of(trainer).tune(
        trainer,
        model,
        data,
        optimizer=optimizer,
        loss_fn=loss_fn,
        effective_batch_size=effective_batch_size,
        **find_options,
    )


def load(library: str) -> Any:
    """Our integration of ``library``.

    Raises:
        MissingDependencyError: naming the extra to install, if the library is not here.
    """
    with needed(library):
        return importlib.import_module(f"autobatch.integrations.{library}")


def _integration_of(trainer: Any) -> Integration:
    known: list[Integration] = [load(library) for library in dict.fromkeys(_written_in(trainer))]
    # Ours first: what somebody else installs does not take over a trainer that is known here.
    for integration in (*known, *_of_others()):
        try:
            if integration.handles(trainer):
                return integration
        except Exception as exc:
            if integration in known:
                raise
            _skip(integration, exc)
    raise UnsupportedTrainerError(
        f"no integration knows {type(trainer).__module__}.{type(trainer).__qualname__}. Known: transformers.Trainer, "
        "lightning.Trainer, accelerate.Accelerator, ignite.engine.Engine, and what entry points of the group "
        f"{GROUP!r} add. For a loop of your own: autobatch.find() and autobatch.Accumulator"
    )


def _written_in(trainer: Any) -> Iterator[str]:
    """The libraries, among those we know, in which a class of ``trainer`` is written: none is imported for this."""
    for cls in type(trainer).__mro__:
        library = _LIBRARIES.get(cls.__module__.partition(".")[0])
        if library is not None:
            yield library


def _of_others() -> Iterator[Integration]:
    for entry_point in entry_points(group=GROUP):
        try:
            yield entry_point.load()
        except Exception as exc:  # noqa: BLE001 - a broken plug-in must not keep others from working
            _skip(entry_point, exc)


def _skip(plug_in: Any, exc: Exception) -> None:
    name = f"{plug_in.name} = {plug_in.value}" if isinstance(plug_in, EntryPoint) else repr(plug_in)
    warnings.warn(f"the plug-in {name} is skipped: {type(exc).__name__}: {exc}", AutobatchWarning, stacklevel=2)
