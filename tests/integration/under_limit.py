"""What scripts share that train in little memory: the data, the limit, and a witness of what an optimizer saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autobatch.device.host import CHILD_ENVIRONMENT
from autobatch.device.process import status_bytes
from autobatch.units import MIB

ROOT = Path(__file__).parent.parent.parent
EFFECTIVE, HIDDEN = 256, 1 << 14
"""A sample's hidden layer takes a sixteenth of a MiB, so a batch of them takes 16 MiB at each of several places."""


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` to its end. What a witness keeps would cut up a heap, which trials do not: so large tensors have
    none.
    """
    environment = {**os.environ, **CHILD_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def classes() -> TensorDataset:
    """Two windows of samples, each of which is known by its values."""
    torch.manual_seed(0)
    return TensorDataset(torch.randn(2 * EFFECTIVE, 4), torch.randint(4, (2 * EFFECTIVE,)))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))


def leave(mebibytes: int) -> None:
    """Lets this process have so much more than it has now."""
    import resource  # not everywhere

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes()["VmData"] + mebibytes * MIB, hard))


class Witness:
    """Sees each step of an optimizer, and which samples a model was given for it.

    Args:
        model: the model itself, not what a library puts around it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.steps: list[list[Tensor]] = []
        """The inputs of each optimizer step, as micro-batches."""
        self._model, self._inputs = model, list[Tensor]()
        # Both are there before the limit is, or the run would have less than the trials.
        self._weights, self._gradients = ([p.detach().clone() for p in model.parameters()] for _ in range(2))
        self._hooks = [
            model.register_forward_pre_hook(lambda module, inputs: self._inputs.append(inputs[0])),
            optimizer.register_step_pre_hook(self._note),
        ]

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self.steps:
            for kept, parameter in zip(self._gradients, self._model.parameters(), strict=True):
                kept.copy_(parameter.grad)
        self.steps.append(self._inputs[:])
        self._inputs.clear()

    def tell(self, rows: TensorDataset, loss_fn: Callable[[Tensor, Tensor], Tensor], **more: Any) -> None:
        """Prints what was seen, and how far the first step's gradients are from those of its samples one by one."""
        for hook in self._hooks:
            hook.remove()
        targets = {tuple(x.tolist()): y for x, y in zip(*rows.tensors, strict=True)}
        with torch.no_grad():
            for parameter, before in zip(self._model.parameters(), self._weights, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        first = torch.cat(self.steps[0])
        for x in first:
            target = targets[tuple(x.tolist())]
            (loss_fn(self._model(x[None]), target[None]) / len(first)).backward()
        pairs = zip(self._gradients, self._model.parameters(), strict=True)
        seen = [tuple(x.tolist()) for window in self.steps for part in window for x in part]
        told = {
            "steps": [sum(map(len, window)) for window in self.steps],
            "micro_batches": sorted({len(part) for window in self.steps for part in window}),
            "all_seen": sorted(seen) == sorted([*targets] * (len(seen) // len(targets))),
            "error": max(float((ours - known.grad).norm() / known.grad.norm()) for ours, known in pairs),
        }
        print(json.dumps(told | more))
