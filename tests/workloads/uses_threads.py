"""Its import runs a parallel CPU operator: a fork of a process that did so hangs in its first one."""

from __future__ import annotations

import torch

from autobatch.probe.workload import Workload
from tests.workloads import small

torch.ones(1 << 22).add_(1)


def build() -> Workload:
    return small.build()
