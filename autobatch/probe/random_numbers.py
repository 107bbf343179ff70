"""The state of every random number generator that training draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch


def random_states(torch_device: str) -> list[tuple[Callable[[Any], Any], Any]]:
    """Of Python, torch, NumPy where it is loaded, and the device: how to put a state back, and the state now."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    kind = torch.device(torch_device).type
    module = None if kind == "cpu" else torch.get_device_module(kind)
    if module is not None and hasattr(module, "get_rng_state"):
        states.append((lambda state: module.set_rng_state(state, torch_device), module.get_rng_state(torch_device)))
    return states
