"""Ranks of a distributed job, one virtual GPU each."""

import json

import pytest

from autobatch.units import GIB, MIB
from tests.gpu.machines import MODULE, Machine

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

TRAIN = """
import json, os, sys, torch, torch.distributed as dist
from torch import nn
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
net = nn.parallel.DistributedDataParallel(nn.Linear(1024, 1024).cuda(), device_ids=[rank])
optimizer = torch.optim.Adam(net.parameters())
for _ in range(2):
    net(torch.randn(8, 1024, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
mine = torch.tensor([7, rank]).cuda()
all_of = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(all_of, mine)
reduced = mine.clone()
dist.all_reduce(reduced)
gathered = [each.tolist() for each in all_of]
sys.stdout.write(json.dumps([rank, dist.get_world_size(), torch.cuda.current_device(), gathered]) + "\\n")  # at once
dist.destroy_process_group()
"""
ACCELERATE = """
import json, sys, torch
from accelerate import Accelerator
accelerator = Accelerator(mixed_precision="bf16")
net = torch.nn.Linear(64, 64)
net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
accelerator.backward(net(torch.randn(4, 64, device=accelerator.device)).sum())
optimizer.step()
sys.stdout.write(json.dumps([accelerator.process_index, accelerator.num_processes, str(accelerator.device)]) + "\\n")
accelerator.end_training()
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, cards=2, outside_bytes=100 * MIB)


def lines(output):
    return sorted(json.loads(line) for line in output.splitlines() if line.startswith("["))


def test_torchrun_gives_each_rank_a_card(forks, machine, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    torchrun, command = MODULE.format("torch.distributed.run"), ["--standalone", "--nproc_per_node", "2", str(script)]
    output = forks.run(torchrun, *command, **machine.environment())
    # What the other rank would send is what this one sent.
    assert lines(output) == [[0, 2, 0, [[7, 0], [7, 0]]], [1, 2, 1, [[7, 1], [7, 1]]]]
    for card in machine.state():
        [process] = card.processes
        assert not process.alive
        assert 120 * MIB < process.peak_bytes < GIB


def test_accelerate_launch(forks, machine, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(ACCELERATE)
    command = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    launch = MODULE.format("accelerate.commands.launch")
    output = forks.run(launch, *command, **machine.environment(HF_HOME=str(tmp_path / "hf")))
    assert lines(output) == [[0, 2, "cuda:0"], [1, 2, "cuda:1"]]
