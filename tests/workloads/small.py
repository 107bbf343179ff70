"""Small workloads for tests of child processes: one that fits, and every way of not doing so."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from torch import nn

from autobatch.probe.workload import Workload
from autobatch.units import MIB


class Eater(nn.Module):
    """Keeps 1 MiB a sample for its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).mean()


def build() -> Workload:
    model = Eater()
    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.0), sample=lambda n: torch.zeros(n, MIB // 4))


def leaves_garbage() -> Workload:
    """A cycle that only a collection ends; its end is waited for in the second batch that is made."""
    gc.disable()
    model, made = Eater(), list[int]()
    model.itself = [model]
    left = weakref.ref(model)
    del model

    def sample(n: int) -> torch.Tensor:
        made.append(n)
        if len(made) > 2 and left() is not None:
            raise KeyError("what building left is still there")
        return torch.zeros(n, MIB // 4)

    return Workload(Eater(), sample=sample)


def build_on(device: str) -> Workload:
    assert device != "cpu" or torch.get_default_device().type == "cpu"
    return build()


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def _raise_key_error() -> None:
    raise KeyError("column")


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("it broke")


def _raise_unpicklable() -> None:
    raise UnpicklableError(1, 2)


KEY_ERROR, UNPICKLABLE, KILLED, CRASHES, HANGS = range(101, 106)
"""The sizes of :func:`odd` that end like this."""


def odd(how: Path) -> Workload:
    """Fits, but for the sizes above. Where the file ``how`` names another builder, it is built by that one."""
    if name := how.read_text():
        built: Workload = globals()[name]()
        return built
    workload = build()
    make = workload.sample
    ends = {
        KEY_ERROR: _raise_key_error,
        UNPICKLABLE: _raise_unpicklable,
        KILLED: lambda: _die(signal.SIGKILL),
        CRASHES: lambda: _die(signal.SIGSEGV),
        HANGS: lambda: time.sleep(1000),
    }

    def sample(n: int) -> torch.Tensor:
        ends.get(n, lambda: None)()
        return make(n)

    workload.sample = sample
    return workload


def has_a_child_of_its_own() -> Workload:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    return build()


def fails_while_built() -> Workload:
    raise LookupError("no such model")


def leaves_while_built() -> Workload:
    os._exit(9)


def returns_nothing() -> None:
    """Not a workload."""


def both() -> Workload:
    workload = build()
    workload.mode = "both"
    return workload


def step(n: int) -> None:
    torch.zeros(n, MIB // 4).add_(1)
