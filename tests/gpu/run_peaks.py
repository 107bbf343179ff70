"""Peaks of training steps on the device "cuda": ``python run_peaks.py GROUP`` prints a line of JSON for each case.

The same script under the sketched virtual GPU gave ``tests/data/sketch_peaks.json``. Each line has the name of the
case, the bytes allocated and reserved at their peaks, and the allocator's retries.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

GIB = 2**30


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.after(x))


class Transformer(nn.Module):
    def __init__(self, *, width=512, layers=4, vocabulary=16000, checkpointed=False) -> None:
        super().__init__()
        self.embedding, self.checkpointed = nn.Embedding(vocabulary, width), checkpointed
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


def tokens(batch, length=512):
    return torch.randint(0, 16000, (batch, length)).cuda()


def images(batch):
    return torch.randn(batch, 3, 224, 224).cuda()


def train(net, make, batches, *, optimizer=torch.optim.AdamW, precision=None, scaled=False, **options):
    """Steps with these batch sizes; the last line of every training loop there is."""
    chosen = optimizer(net.parameters(), lr=0.01, **options)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    for batch in batches:
        after_a_look_of_the_watchdog()
        inputs = make(batch)
        with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
            output = net(inputs)
            flat = output.flatten(0, -2)
            loss = cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long, device="cuda"))
        scaler.scale(loss).backward()
        scaler.step(chosen)
        scaler.update()
        chosen.zero_grad()
        del inputs, output, flat, loss


def until_it_fails(net, make, batches):
    try:
        train(net, make, batches)
    except torch.OutOfMemoryError:
        return
    raise AssertionError("all of it fitted")


def resnet(**options):
    return lambda: train(torchvision.models.resnet50().cuda(), images, (32, 32, 32), **options)


def gpt(batches=(4, 4, 4), net=None, **options):
    return lambda: train(Transformer(**(net or {})).cuda(), tokens, batches, **options)


def channels_last():
    net = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    train(net, lambda n: images(n).to(memory_format=torch.channels_last), (16, 16, 16), precision=torch.bfloat16)


def lengths():
    net = Transformer().cuda()
    train(net, lambda length: tokens(8, length), (512, 100, 300, 1000, 64, 700))


def out_of_memory():
    until_it_fails(Transformer(layers=2).cuda(), tokens, (64, 16, 128, 192, 256, 320, 384))


def fraction():
    torch.cuda.set_per_process_memory_fraction(0.1)
    until_it_fails(Transformer(layers=2).cuda(), tokens, (8, 16, 24, 32, 40, 48, 56, 64, 96, 128))
    torch.cuda.set_per_process_memory_fraction(1.0)


def compiled():
    train(torch.compile(Transformer(layers=1).cuda()), tokens, (4, 4, 4), precision=torch.bfloat16)


def ddp():
    join_world()
    net = nn.parallel.DistributedDataParallel(Transformer().cuda())
    train(net, tokens, (4, 4, 4))


def fsdp():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    join_world()
    mesh = init_device_mesh("cuda", (8,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device("meta"):
        net = Transformer(width=1024, layers=6)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    train(net.to_empty(device="cuda"), tokens, (2, 2, 2))


def after_a_look_of_the_watchdog():
    """Waits until torch's thread that looks for finished collectives has just done so, as it does ten times a second.

    What they held is freed by the next collective after that: a look in the middle of a step changes its peak.
    """
    if not torch.distributed.is_initialized():
        return
    number = kept()
    before = torch.cuda.memory_allocated()
    torch.distributed.all_reduce(torch.zeros(1, device="cuda"), async_op=True)  # nobody waits for it but the thread
    while torch.cuda.memory_allocated() > before:
        time.sleep(0.002)
        torch.distributed.all_reduce(number)


@functools.cache
def kept():
    return torch.zeros(1, device="cuda")


def join_world():
    """This process is the first of eight, which has nobody to wait for."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", rank=0, world_size=8, store=store)


PLAIN: dict[str, Callable[[], None]] = {
    "resnet50 fp32": resnet(),
    "resnet50 bf16": resnet(precision=torch.bfloat16),
    "resnet50 bf16 channels_last": channels_last,
    "resnet50 sgd": resnet(optimizer=torch.optim.SGD, momentum=0.9),
    "gpt fp32": gpt(),
    "gpt bf16": gpt(precision=torch.bfloat16),
    "gpt sgd": gpt(optimizer=torch.optim.SGD, momentum=0.9),
    "gpt adamw fused": gpt(fused=True),
    "gpt adamw for-loop": gpt(foreach=False),
    "gpt checkpointed": gpt(net={"checkpointed": True}),
    "gpt sizes": gpt((1, 8, 3, 16, 5, 2)),
    "gpt lengths": lengths,
    "gpt out of memory": out_of_memory,
    "gpt fraction": fraction,
}
GROUPS = {
    "plain": PLAIN,
    "expandable": {name: case for name, case in PLAIN.items() if name != "gpt fraction"},
    "world": {"gpt ddp": ddp, "gpt fsdp2": fsdp},
    "compiled": {"gpt compiled": compiled},
}
"""``expandable`` is for a process with PYTORCH_ALLOC_CONF=expandable_segments:True."""


def main(group: str) -> None:
    for name, case in GROUPS[group].items():
        torch.manual_seed(0)
        after_a_look_of_the_watchdog()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        case()
        stats = torch.cuda.memory_stats()
        keys = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries")
        print(json.dumps([name, *(stats[key] for key in keys)]), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads must not outlive main()


if __name__ == "__main__":
    main(sys.argv[1])
