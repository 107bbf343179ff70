"""Workloads of host memory: little arithmetic for the memory they take."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from autobatch.probe.workload import Workload


def mlp() -> Workload:
    model = nn.Sequential(nn.Linear(64, 16384), nn.ReLU(), nn.Dropout(), nn.Linear(16384, 1))
    return Workload(model, torch.optim.AdamW(model.parameters()), functional.mse_loss, _pairs((64,), (1,)))


def convolutions() -> Workload:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(1))
    model(torch.zeros(2, 3, 64, 64))
    return Workload(model, torch.optim.SGD(model.parameters(), lr=0.1), functional.mse_loss, _pairs((3, 64, 64), (1,)))


def attention() -> Workload:
    model = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return Workload(model, torch.optim.AdamW(model.parameters()), functional.mse_loss, _pairs((128, 64), (128, 64)))


def _pairs(inputs: tuple[int, ...], targets: tuple[int, ...]) -> object:
    return lambda n: (torch.zeros(n, *inputs), torch.zeros(n, *targets))
