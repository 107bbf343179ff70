"""What a caller may give to find(): live objects, a function that builds them, or a step of training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autobatch.device.base import Device
from autobatch.errors import InvalidArgumentError
from autobatch.probe.command import Command
from autobatch.probe.workload import Workload
from autobatch.probe.workload.building import takes_device

Source = Workload | Command | Callable[..., Any]
"""A Workload of live objects, a function without required arguments that builds one, or a training command."""


@dataclass(frozen=True, slots=True)
class StepBuilder:
    """Makes a Workload of a step function, in whatever process it is called."""

    step: Callable[[int], Any]

    def __call__(self) -> Workload:
        return Workload.from_step(self.step)

    def __repr__(self) -> str:
        return repr(self.step)  # what the caller gave is what an error should name


def source_of(workload: Any, state: Sequence[Any]) -> Source:
    """``workload`` as a Source.

    Raises:
        InvalidArgumentError: if it is neither a Workload nor callable, or if ``state`` is given for a Workload.
    """
    if not isinstance(state, (list, tuple)):
        raise InvalidArgumentError("state", state, "a list of what the step changes: [model, optimizer]")
    if isinstance(workload, Workload):
        if state:
            raise InvalidArgumentError("state", state, "empty for a Workload, which takes extra_state itself")
        return workload
    if isinstance(workload, Command):
        if state:
            raise InvalidArgumentError("state", state, "empty for a Command, which has its state in its own processes")
        return workload
    if isinstance(workload, nn.Module):
        raise InvalidArgumentError("workload", type(workload).__name__, "Workload(model, ...), not the model alone")
    if not callable(workload):
        raise InvalidArgumentError("workload", workload, "a Workload, a function that builds one, step(n) or a Command")
    if takes_device(workload) or not _required_parameters(workload):
        return workload  # type: ignore[no-any-return]
    return Workload.from_step(workload, state=state)


def builder_of(source: Source) -> Callable[..., Any] | None:
    """What another process can call to have ``source``; None for live objects."""
    if isinstance(source, Command):
        return None
    if not isinstance(source, Workload):
        return source
    return None if source.step is None else StepBuilder(source.step)


def _required_parameters(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def check_placed(workload: Workload, device: Device) -> None:
    """Raises InvalidArgumentError if the model of ``workload`` is not on ``device``; moving it is the caller's."""
    if workload.step is None and str(workload.device) != device.torch_device:
        raise InvalidArgumentError(
            "device",
            device.torch_device,
            f"where the model is ({workload.device}); move it with model.to({device.torch_device!r}) before its "
            f"optimizer is made, or give device={str(workload.device)!r}",
        )
