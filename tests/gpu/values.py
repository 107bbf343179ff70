"""Bits of a run, taken and compared without the library's own way of doing so, and memory that is really short."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

DEVICE = "cuda:0"


def seed_all(seed: int = 5) -> None:
    """Every generator that training draws from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def bits(*things: Any) -> dict[str, Any]:
    """A copy on the host of all that a step may change of ``things``, bit for bit, and of every generator's state.

    Modules and optimizers are read as torch lists them, anything else by its ``state_dict()``; a function has nothing.
    """
    found: dict[str, Any] = {}
    for number, thing in enumerate(things):
        whose = f"{type(thing).__name__} {number}"
        found |= {f"{whose} {name}": _copied(value) for name, value in _parts(thing)}
    name, drawn, *place = numpy.random.get_state()
    found |= {"python": random.getstate(), "numpy": (name, drawn.tolist(), *place), "torch": torch.get_rng_state()}
    if torch.device(DEVICE).type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(DEVICE)
    return found


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same in both, or in one of them only."""
    names = {**before, **after}
    return [name for name in names if not _is_same(before.get(name), after.get(name))]


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, nn.Module):
        for name, parameter in thing.named_parameters():
            yield name, parameter
            yield f"{name}.grad", parameter.grad
        yield from thing.named_buffers()
        yield "training", [module.training for module in thing.modules()]
    elif isinstance(thing, torch.optim.Optimizer):
        for number, group in enumerate(thing.param_groups):
            for place, parameter in enumerate(group["params"]):
                for name, value in dict(thing.state.get(parameter, {})).items():
                    yield f"{number}.{place}.{name}", value
            yield f"{number}", {name: value for name, value in group.items() if name != "params"}
    elif hasattr(thing, "state_dict"):
        yield from thing.state_dict().items()


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    # As bytes: a NaN is the same as itself, and zero is not minus zero.
    return value.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def warm() -> None:
    """What cuBLAS keeps (32 MiB on a Hopper) is there before memory is short: for this thread, and for the one that
    runs backward."""
    layer = nn.Linear(64, 64, device=DEVICE)
    layer(torch.ones(64, 64, device=DEVICE)).sum().backward()


@contextlib.contextmanager
def room_for(added_bytes: int) -> Iterator[None]:
    """Inside, this process can reserve ``added_bytes`` beside what it has, and runs out of memory above."""
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(DEVICE).total_memory
    limit_bytes = torch.cuda.memory_reserved(DEVICE) + added_bytes
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        torch.cuda.empty_cache()
