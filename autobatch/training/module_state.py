"""What modules have beside their ``state_dict``: buffers that are not persistent, and generators of random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def unsaved_state(modules: Sequence[nn.Module]) -> list[dict[str, dict[str, Any]]]:
    """Of each of ``modules``, by the names of their parts: what a ``state_dict`` leaves out."""
    return [
        {
            "buffers": {
                f"{name}.{key}": buffer for name, part in module.named_modules() for key, buffer in _kept(part)
            },
            "generators": {name: generator.get_state() for name, generator in _generators(module)},
        }
        for module in modules
    ]


def set_unsaved_state(modules: Sequence[nn.Module], states: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Puts back, in place, what :func:`unsaved_state` gave. What a module does not have any more is left out."""
    for module, state in zip(modules, states, strict=False):
        with torch.no_grad():
            for name, part in module.named_modules():
                for key, buffer in _kept(part):
                    saved = state["buffers"].get(f"{name}.{key}")
                    if saved is not None and saved.shape == buffer.shape:
                        buffer.copy_(saved)
        for name, generator in _generators(module):
            if name in state["generators"]:
                generator.set_state(state["generators"][name])


def _kept(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    names = part._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in part._buffers.items() if name in names and buffer is not None]


def _generators(module: nn.Module) -> list[tuple[str, torch.Generator]]:
    return [
        (f"{name}.{key}", value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Generator)
    ]
