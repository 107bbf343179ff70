"""What ranks do in the tests of tune(): each function runs on every rank, and gives what goes to JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autobatch
from autobatch.probe.state import fingerprint

HIDDEN = 1 << 14
"""A sixteenth of a MiB for each sample."""


def parts() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))
    return model, TensorDataset(torch.randn(512, 4), torch.randint(4, (512,)))


class Steps:
    """The optimizer steps of all ranks: of which samples, and how far the first one's gradients are from theirs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = model.module if isinstance(model, DistributedDataParallel) else model
        self._inputs, self._gradients = list[Tensor](), list[Tensor]()
        self.windows: list[Tensor] = []
        self.sizes: set[int] = set()
        self._weights = [parameter.detach().clone() for parameter in model.parameters()]
        self._hooks = [
            self._module.register_forward_pre_hook(lambda module, inputs: self._inputs.append(inputs[0])),
            optimizer.register_step_pre_hook(self._note),
        ]

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._gradients:
            self._gradients = [parameter.grad.clone() for parameter in self._module.parameters()]
        self.sizes |= {len(part) for part in self._inputs}
        self.windows.append(torch.cat(self._inputs))
        self._inputs.clear()

    def told(self, rows: TensorDataset) -> dict[str, Any]:
        for hook in self._hooks:
            hook.remove()
        weights = [float(parameter.double().sum()) for parameter in self._module.parameters()]
        everybody: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everybody, self.windows)
        whole = [torch.cat(windows) for windows in zip(*everybody, strict=True)]
        with torch.no_grad():
            for parameter, before in zip(self._module.parameters(), self._weights, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        targets = {tuple(x.tolist()): y for x, y in zip(*rows.tensors, strict=True)}
        y = torch.stack([targets[tuple(x.tolist())] for x in whole[0]])
        for start in range(0, len(y), 16):
            part = slice(start, start + 16)
            (functional.cross_entropy(self._module(whole[0][part]), y[part], reduction="sum") / len(y)).backward()
        pairs = zip(self._gradients, self._module.parameters(), strict=True)
        return {
            "windows": [len(samples) for samples in whole],
            "micro_batches": sorted(self.sizes),
            "distinct": [len({tuple(x.tolist()) for x in samples}) for samples in whole],
            "error": max(float((ours - known.grad).norm() / known.grad.norm()) for ours, known in pairs),
            "weights": weights,
        }


@contextmanager
def accelerated(rank: int, **options: Any) -> Iterator[Any]:
    """An Accelerator, as in a process that torchrun has started."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    size = str(distributed.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, **options)


def accelerate(rank: int, limits: list[int], effective: int | None, splits: bool = False) -> dict[str, Any]:
    from accelerate import DataLoaderConfiguration

    with accelerated(rank, dataloader_config=DataLoaderConfiguration(split_batches=splits)) as accelerator:
        model, rows = parts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inner = optimizer
        loader = DataLoader(rows, 64, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        before = fingerprint(model, optimizer)
        found = autobatch.tune(
            accelerator,
            model,
            loader,
            optimizer=optimizer,
            loss_fn=functional.cross_entropy,
            effective_batch_size=effective,
            memory_limit=f"{limits[rank]}MiB",
            multiple_of="pow2",
        )
        kept, steps = fingerprint(model, optimizer) == before, Steps(model, inner)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        set_now = [loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps, loader.total_batch_size]
        return steps.told(rows) | {"size": found.batch_size, "set": set_now, "kept": kept, "notes": found.notes[-3:]}


def accelerate_with(rank: int, effective: int) -> None:
    with accelerated(rank) as accelerator:
        model, rows = parts()
        optimizer = torch.optim.SGD(model.parameters())
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, 64))
        options = {"loss_fn": functional.cross_entropy, "effective_batch_size": effective}
        try:
            autobatch.tune(accelerator, model, loader, optimizer=optimizer, **options)
        finally:
            assert (loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps) == (64, 1)


def _engine(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    from ignite.engine import Engine, create_supervised_trainer

    from autobatch.integrations.ignite import update

    if kind == "supervised":
        return create_supervised_trainer(model, optimizer, functional.cross_entropy)
    return Engine(update(autobatch.Accumulator(model, optimizer, functional.cross_entropy, micro_batch_size=1)))


def ignite(rank: int, limits: list[int], effective: int | None, kind: str, wrapped: bool = True) -> dict[str, Any]:
    torch.set_num_threads(1)
    bare, rows = parts()
    model = DistributedDataParallel(bare) if wrapped else bare
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(rows, 64, sampler=DistributedSampler(rows, seed=3))
    engine = _engine(kind, model, optimizer)
    before = fingerprint(model, optimizer)
    options = {"memory_limit": f"{limits[rank]}MiB", "multiple_of": "pow2"}
    found = autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=effective, **options)
    kept, steps = fingerprint(model, optimizer) == before, Steps(model, optimizer)
    engine.run(loader)
    told = steps.told(rows) | {"size": found.batch_size, "kept": kept, "notes": found.notes[-3:]}
    accumulator = getattr(engine._process_function, "accumulator", None)
    return told | {"set": [loader.batch_size, getattr(accumulator, "micro_batch_size", None)]}
