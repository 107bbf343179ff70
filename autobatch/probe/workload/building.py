"""Making a workload of the function that builds it, in whatever process it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from autobatch.device.oom import Tier, classify
from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.probe.workload import Workload
from autobatch.units import format_bytes


def build(builder: Callable[..., Any], torch_device: str) -> Any:
    """The workload that ``builder`` makes, on ``torch_device``.

    Raises:
        DoesNotFitError: saying how many bytes the model needs, if it alone does not fit.
    """
    failure = None
    try:
        workload = _call(builder, torch_device)
        if not isinstance(workload, Workload):
            raise InvalidArgumentError("workload", workload, "a function that returns an autobatch.Workload")
        workload.to(torch_device)
        return workload
    except Exception as exc:  # noqa: BLE001 - classified below: what is not memory is raised unchanged
        failure = exc
    if classify(failure) is not Tier.DEFINITE:
        raise failure
    raise DoesNotFitError(f"the model alone does not fit on {torch_device}: {_needs(builder)}") from failure


def _call(builder: Callable[..., Any], torch_device: str) -> Any:
    return builder(device=torch_device) if takes_device(builder) else builder()


def takes_device(builder: Callable[..., Any]) -> bool:
    """True if ``builder`` wants to know the device, to make its model there directly."""
    return "device" in inspect.signature(builder).parameters


def _needs(builder: Callable[..., Any]) -> str:
    """How much the parameters and buffers take, counted on torch's device without memory where that is possible."""
    if not takes_device(builder):
        return "it ran out of memory while it was made"
    model = builder(device="meta").model
    size = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    return f"its parameters and buffers take {size} bytes ({format_bytes(size)})"
