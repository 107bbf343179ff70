"""Collectives amid a step of live objects: known before they can hang.

The process of live objects cannot be lost. If a step there runs a collective and another rank fails before it comes to
it, the step waits for ever. So one step is looked at first, and a collective in it is an error that says the way.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.errors import InvalidArgumentError
from autobatch.probe.workload import Workload

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # as torch names its collectives
_THE_WAY = "a function that builds the Workload, init_process_group() included, and can be imported by its name"


class RefusingCollectives(TorchDispatchMode):
    """Inside, a collective is an error before it is run.

    Raises:
        InvalidArgumentError: naming the collective, and what may run it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            raise InvalidArgumentError(
                "workload", f"a step that runs a collective ({func})", f"{_THE_WAY}: trials of it can be given up"
            )
        return func(*args, **(kwargs or {}))


def check_local(workload: Workload, *, stays: bool) -> None:
    """Refuses what one rank of several cannot try by itself in this process.

    Args:
        stays: whether this very process runs the trials, and not forks of it.

    Raises:
        InvalidArgumentError: for a sharded model; for DistributedDataParallel with a static graph, which notes the
            first backward pass of this process.
    """
    model: nn.Module | None = getattr(workload, "model", None)
    if model is None:
        return
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InvalidArgumentError("workload", "a live model that is sharded over the ranks", _THE_WAY)
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise InvalidArgumentError("workload", "a live model in FullyShardedDataParallel", _THE_WAY)
    if stays and isinstance(model, DistributedDataParallel) and model.static_graph:
        allowed = f"DistributedDataParallel without static_graph=True, or {_THE_WAY}"
        raise InvalidArgumentError("workload", "DistributedDataParallel(static_graph=True)", allowed)
