"""Small workloads for tests of child processes: one that fits, and every way of not doing so."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref

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


def _failing(fail: object, above: int = 2) -> Workload:
    workload = build()
    make = workload.sample

    def sample(n: int) -> torch.Tensor:
        if n > above:
            fail()
        return make(n)

    workload.sample = sample
    return workload


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def raises_key_error() -> Workload:
    def fail() -> None:
        raise KeyError("column")

    return _failing(fail)


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("it broke")


def raises_unpicklable() -> Workload:
    def fail() -> None:
        raise UnpicklableError(1, 2)

    return _failing(fail)


def killed() -> Workload:
    return _failing(lambda: _die(signal.SIGKILL))


def crashes() -> Workload:
    return _failing(lambda: _die(signal.SIGSEGV))


def hangs() -> Workload:
    return _failing(lambda: time.sleep(1000))


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
