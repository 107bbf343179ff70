"""A workload for the comparison with the peers: a few MiB of it end a search soon."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from autobatch.probe.workload import Workload


def tiny(device: str) -> Workload:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Dropout(), nn.Linear(8192, 1))
    optimizer = torch.optim.AdamW(model.parameters())

    def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(n, 64, device=device), torch.zeros(n, 1, device=device)

    return Workload(model, optimizer, functional.mse_loss, sample)
