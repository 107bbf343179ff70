"""Small training runs for the tests of accumulation, and losses that fail."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import Accumulator


class Fails(nn.Module):
    """A loss that fails at its ``at``-th call with ``error``, and counts its calls in a buffer."""

    calls: Tensor

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__()
        self.at, self.error = at, error
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.at -= 1
        if self.at == 0:
            raise self.error
        return nn.functional.mse_loss(output, target)


SUSPECT = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def linear(loss_fn: Any, size: int = 8, **options: Any) -> tuple[nn.Linear, Accumulator]:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, Accumulator(model, optimizer, loss_fn, micro_batch_size=size, **options)


def windows(count: int) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(9)
    sizes = [random.Random(4 + i).randint(17, 24) for i in range(count)]
    return [(torch.randn(n, 6, generator=chance), torch.randn(n, 2, generator=chance)) for n in sizes]
