"""What ranks do in the tests of find(): each function runs on every rank, and gives what goes to JSON."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from autobatch import Workload, find
from autobatch.probe.state import fingerprint
from autobatch.units import MIB

OPTIONS: dict[str, Any] = {"device": "cpu", "multiple_of": 40, "start": 40}
"""From 32 MiB on malloc takes every block from the system, so that what fits is known beforehand."""


def hog(per_sample: int = 1) -> Callable[[int], None]:
    """A step that needs so many MiB a sample, and lets go of them. They are not touched, so it takes no time."""

    def step(n: int) -> None:
        torch.empty(n * per_sample * MIB, dtype=torch.uint8)

    return step


def told(result: Any) -> dict[str, Any]:
    assert not psutil.Process().children(recursive=True)
    return {
        "size": result.batch_size,
        "failures": result.oom_count,
        "ranks": result.environment.get("ranks"),
        "sizes": result.environment.get("rank_sizes"),
        "budgets": result.environment.get("rank_budgets_bytes"),
        "where": result.environment["trials_in"],
        "notes": result.notes,
        "all": result.to_json(),
    }


def search(rank: int, limits: list[int], per_sample: list[int], **options: Any) -> dict[str, Any]:
    """Limits in MiB, and MiB a sample, by rank."""
    limit = f"{limits[rank]}MiB"
    return told(find(hog(per_sample[rank]), memory_limit=limit, **OPTIONS, **options))


def search_freely(rank: int) -> dict[str, Any]:
    """Without a limit, so that the machine's memory is shared."""
    return told(find(hog(), **OPTIONS, max_batch_size=40)) | {"available": psutil.virtual_memory().available}


def search_with(rank: int, options: list[dict[str, Any]]) -> dict[str, Any]:
    return told(find(hog(), **{**OPTIONS, "memory_limit": "400MiB", **options[rank]}))


def fail(rank: int, at: int) -> dict[str, Any]:
    """Rank 1 has an error of its own from a batch of ``at`` on, which is none of memory."""

    def step(n: int) -> None:
        if rank == 1 and n >= at:
            raise KeyError("column 7")

    return told(find(step, **OPTIONS, max_batch_size=200))


def die(rank: int, who: int) -> dict[str, Any]:
    trials = []

    def on_trial(trial: Any) -> None:
        trials.append(trial)
        if rank == who and len(trials) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    started_s = time.monotonic()
    try:
        find(hog(), **OPTIONS, memory_limit="400MiB", on_trial=on_trial)
    finally:
        assert time.monotonic() - started_s < 30
    return {}


class Wide(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(64, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 8))


def pairs(n: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, 64), torch.zeros(n, 8)


def search_wrapped(rank: int, limits: list[int]) -> dict[str, Any]:
    """Live objects in DistributedDataParallel, which go on to train together."""
    model = DistributedDataParallel(Wide())
    optimizer = torch.optim.AdamW(model.parameters())
    before = fingerprint(model, optimizer)
    workload = Workload(model, optimizer, functional.mse_loss, pairs)
    found = find(workload, device="cpu", memory_limit=f"{limits[rank]}MiB", start=2, multiple_of="pow2")
    kept = fingerprint(model, optimizer) == before
    torch.manual_seed(rank)
    for _ in range(3):
        functional.mse_loss(model(torch.randn(8, 64)), torch.randn(8, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [float(parameter.double().sum()) for parameter in model.parameters()]
    return told(found) | {"kept": kept, "weights": weights}


def search_step_with_collective(rank: int) -> dict[str, Any]:
    def step(n: int) -> None:
        distributed.all_reduce(torch.ones(n))

    return told(find(step, **OPTIONS, max_batch_size=64))


def search_static(rank: int) -> dict[str, Any]:
    """In this very process a static graph would learn from the trials."""
    model = DistributedDataParallel(Wide(), static_graph=True)
    workload = Workload(model, None, functional.mse_loss, pairs)
    return told(find(workload, device="cpu", isolate=False, max_batch_size=2))


def search_live_shards(rank: int) -> dict[str, Any]:
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    model = fully_shard(Wide(), mesh=mesh)
    return told(find(Workload(model, None, functional.mse_loss, pairs), device="cpu", max_batch_size=2))


class Odd(nn.Module):
    """Between two sharded layers: on rank 1 it takes 8 MiB a sample, and does whatever ``PROBE_ODD`` says."""

    def forward(self, x: Tensor) -> Tensor:
        if distributed.get_rank() == 1:
            torch.empty(len(x) * 8 * MIB, dtype=torch.uint8)
            odd = os.environ["PROBE_ODD"]
            if odd == "error" and len(x) >= 4:
                raise KeyError("column 7")
            if odd == "killed" and len(x) >= 4:
                os.kill(os.getpid(), signal.SIGKILL)
        return x


def build_sharded() -> Workload:
    distributed.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(64, 64), Odd(), nn.Linear(64, 8))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return Workload(model, torch.optim.AdamW(model.parameters()), functional.mse_loss, pairs)


def search_sharded(rank: int, odd: str = "") -> dict[str, Any]:
    os.environ["PROBE_ODD"] = odd
    found = find(build_sharded, device="cpu", memory_limit="400MiB", multiple_of="pow2", growth=4.0)
    return told(found)
