"""State of which each rank has a part (FSDP2's DTensors): whole for a checkpoint, and in parts again.

A checkpoint holds whole tensors, so that a run may go on with other ranks, or with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, optim


def whole_state(module: nn.Module, *, is_kept: bool) -> dict[str, Any]:
    """The ``state_dict`` of ``module`` with whole tensors, on the host; a collective.

    Args:
        is_kept: False where this rank has no use for it, and each tensor is let go of at once.
    """
    met: dict[int, Any] = {}  # a tied parameter has one tensor, by which a checkpoint knows it
    state = module.state_dict(keep_vars=True)  # which gives the parameter itself, and not a view for each of its names
    for value in state.values():
        if id(value) not in met:
            met[id(value)] = whole(value, is_kept=is_kept)
    return {name: met[id(value)] for name, value in state.items()}


def whole(state: Any, *, is_kept: bool) -> Any:
    """``state`` with each sharded tensor whole, on the host; a collective that walks dicts and lists in their order."""
    if _is_sharded(state):
        full = state.full_tensor().detach()
        return full.cpu() if is_kept else None
    if isinstance(state, Mapping):
        return {key: whole(value, is_kept=is_kept) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([whole(value, is_kept=is_kept) for value in state])
    return state


def in_parts(state: Any, like: Any) -> Any:
    """``state``, which is whole, with this rank's part of each tensor that is sharded in ``like``.

    No collective: every rank has read the whole.
    """
    if _is_sharded(like) and isinstance(state, Tensor) and state.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor  # there is a sharded tensor, so there is this

        return distribute_tensor(state.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    if isinstance(like, Mapping) and isinstance(state, Mapping):
        return {key: in_parts(value, like.get(key)) for key, value in state.items()}
    if isinstance(like, (list, tuple)) and isinstance(state, (list, tuple)) and len(state) == len(like):
        return type(state)([in_parts(value, other) for value, other in zip(state, like, strict=True)])
    return state


def optimizer_in_parts(state: Mapping[str, Any], optimizer: optim.Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer, whole, as it is for one of these sharded parameters.

    It may have no state yet to take after: what has a parameter's shape is sharded as that is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        index: {name: in_parts(value, parameters[index]) for name, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    return {**state, "state": sharded}


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")
