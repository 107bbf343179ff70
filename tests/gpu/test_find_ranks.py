"""find() under torchrun with nccl, on GPUs of 24 and 16 GB that are not there: agreement itself travels over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autobatch.units import GIB
from autobatch.virtual.catalog import Card
from autobatch.virtual.state import create_state
from tests.gpu.machines import MODULE, Forks, Machine

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

BUILD = """
import gc, json, os, sys, torch, torch._dynamo, torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from autobatch import Workload, find

gc.freeze()  # every trial collects garbage, and what was imported is large and none

def pairs(n):
    device = f"cuda:{torch.cuda.current_device()}"  # on the host it would be real memory
    return torch.zeros(n, 512, 1024, device=device), torch.zeros(n, 512, 1024, device=device)

def layers(device):
    with torch.device(device):
        return nn.Sequential(*(nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True) for _ in range(2)))

def build(device):
    from torch.distributed.fsdp import fully_shard
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    model = layers(device)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return Workload(model, torch.optim.AdamW(model.parameters()), mse_loss, pairs)

def train(model, optimizer, size):
    for _ in range(5):
        inputs, targets = pairs(size)
        mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

def tell(rank, found):
    known = {name: found.environment.get(name) for name in ("ranks", "rank_sizes", "trials_in")}
    peak = torch.cuda.max_memory_reserved()
    told = [rank, found.batch_size, found.smallest_failure, known, peak, torch.cuda.memory_stats()["num_ooms"]]
    sys.stdout.write(json.dumps(told) + "\\n")

def leave():
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # to take all that was imported apart is a second's work
"""
LIVE = """
if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    for way in sys.argv[1:]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = nn.parallel.DistributedDataParallel(layers(device), device_ids=[rank])
        optimizer = torch.optim.AdamW(model.parameters())
        workload = Workload(model, optimizer, mse_loss, pairs)
        found = find(workload, device=device, per_rank=way == "per_rank", headroom=0.02)
        train(model, optimizer, found.batch_size)
        tell(rank, found)
        del model, optimizer, workload
    leave()
"""
SHARDED = """
if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo")
    found = find(build, device=f"cuda:{rank}", headroom=0.02)
    dist.destroy_process_group()
    workload = build(f"cuda:{rank}")
    train(workload.model, workload.optimizer, found.batch_size)
    tell(rank, found)
    leave()
"""


class Unequal(Machine):
    """A machine whose GPUs are of these sizes."""

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        self.path, self.counts = folder / "state", folder / "calls"
        rest: dict[str, Any] = {"outside_bytes": 0, "capability": (8, 0), "multiprocessors": 108, "sources": {}}
        cards = [Card(name=f"test{n}", title=f"Test GPU {n}", total_bytes=size, **rest) for n, size in enumerate(sizes)]
        create_state(self.path, cards)


def ranks(forks: Forks, folder: Path, script: str, *words: str, sizes: tuple[int, ...] = (24, 16)) -> list[Any]:
    """What each rank tells, in their order."""
    path = folder / "train.py"
    path.write_text(BUILD + script)
    launch = ["--standalone", "--nproc_per_node", str(len(sizes)), str(path), *words]
    variables = Unequal(folder, [size * GIB for size in sizes]).environment(OMP_NUM_THREADS="1")
    output = forks.run(MODULE.format("torch.distributed.run"), *launch, **variables)
    # Each rank in its order, and all of them in theirs.
    return sorted((json.loads(line) for line in output.splitlines() if line.startswith("[")), key=lambda told: told[0])


@pytest.fixture(scope="module")
def two(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two unequal ranks tell, by the way in which they agree."""
    ways = ["agreed", "per_rank"]
    told = ranks(forks, tmp_path_factory.mktemp("two"), LIVE, *ways)
    return {way: told[number :: len(ways)] for number, way in enumerate(ways)}


def agree_and_train_on(found: list[Any], count: int) -> None:
    assert len(found) == count
    assert len({(size, failure) for _, size, failure, *_ in found}) == 1
    for _, size, failure, known, peak, _ in found:
        assert size < failure
        assert (known["ranks"], known["rank_sizes"], known["trials_in"]) == (count, None, "this process")
        assert 14 * GIB < peak <= 24 * GIB


def test_ranks_agree_on_what_the_smallest_gpu_fits_and_train_on(two: dict[str, list[Any]]) -> None:
    agree_and_train_on(two["agreed"], 2)


@pytest.mark.slow
def test_so_do_four_of_which_one_is_smaller(forks: Forks, tmp_path: Path) -> None:
    agree_and_train_on(ranks(forks, tmp_path, LIVE, "agreed", sizes=(24, 24, 16, 24)), 4)


def test_each_rank_has_its_own_size_and_trains_on(two: dict[str, list[Any]]) -> None:
    (_, large, _, known, *_), (_, small, _, others, *_) = two["per_rank"]
    assert known["rank_sizes"] == others["rank_sizes"] == [large, small]
    assert large / small == pytest.approx(24 / 16, rel=0.1)


@pytest.mark.slow
def test_sharded_models_agree_in_child_processes(forks: Forks, tmp_path: Path) -> None:
    first, second = ranks(forks, tmp_path, SHARDED)
    assert first[1:3] == second[1:3]
    assert first[3] == {"ranks": 2, "rank_sizes": None, "trials_in": "child processes of each rank"}
