"""What ranks do in the tests of accumulation: each function runs on every rank, and gives what goes to JSON."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from autobatch import Accumulator, Trainer
from autobatch.errors import AutobatchWarning
from autobatch.training.events import Event
from tests.unit.test_accumulator import IGNORED, Kept, full_batch, ragged, tied, token_mean, tokens_in
from tests.workloads.training import OUT, Fails

warnings.simplefilter("ignore", AutobatchWarning)


def share(batch: tuple[Tensor, Tensor], rank: int, ends: list[int]) -> tuple[Tensor, Tensor]:
    """The samples of ``rank``: up to ``ends[rank]``, from where those of the rank before end."""
    begin = ends[rank - 1] if rank else 0
    return batch[0][begin : ends[rank]], batch[1][begin : ends[rank]]


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind.startswith("fsdp"):
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (distributed.get_world_size(),)))
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(rank: int, kind: str, ends: list[int], size: int, seed: int, counted: bool = True) -> float:
    """How far the gradients are from the full batch's, which this rank computes alone."""
    batch = ragged(ends[-1], seed)
    reference = full_batch(tied(), token_mean, batch)
    model = tied()
    if rank and kind != "fsdp":
        nn.init.zeros_(model.head.weight)  # which those of rank 0 replace
    model = wrapped(model, kind)
    optimizer = Kept(model.parameters(), lr=0.1)
    count = tokens_in if counted else None
    accumulator = Accumulator(model, optimizer, token_mean, micro_batch_size=size, count=count)
    mine = share(batch, rank, ends)
    window = accumulator.step(*([mine] if len(mine[0]) else []))
    assert window.samples == ends[-1]
    differences = [
        float((whole(one) - other).abs().max() / other.abs().max().clamp(min=1.0))
        for one, other in zip(optimizer.kept, reference, strict=True)
        if one is not None and other is not None
    ]
    assert len(differences) == 1 or kind == "fsdp"
    loss = float(token_mean(tied()(batch[0]), batch[1]))
    return max(*differences, abs(float(window.loss) - loss) if counted else 0.0)


def accelerates_example(rank: int, counted: bool) -> list[float]:
    """The causal example of its guide on two ranks: texts of 1 to 16 tokens in four batches, in turn to each rank."""
    torch.manual_seed(0)
    model = nn.Linear(1, 2, bias=False)
    batches = []
    for begin in (1 + 4 * rank, 9 + 4 * rank):
        texts = [torch.arange(1.0, length + 1) for length in range(begin, begin + 4)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORED)
        batches.append((ids[..., None], torch.where(ids == IGNORED, ids, ids % 2).long()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)
    count = tokens_in if counted else None
    assert Accumulator(model, optimizer, token_mean, micro_batch_size=4, count=count).step(*batches).samples == 16
    return [round(value, 4) for value in model.weight.flatten().tolist()]


class Noisy(nn.Module):
    """Chance and buffers, which a repeated window must not see twice. Runs out where ``left`` calls are over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.in_backward = 0, False
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        self.left -= 1
        if self.left == 0 and not self.in_backward:
            raise OUT
        if self.left == 0:
            out.register_hook(_runs_out)
        return out


def _runs_out(gradient: Tensor) -> None:
    raise OUT


def hash_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    parts = [*model.state_dict().values()]
    parts += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(whole(part).detach().numpy().tobytes())
    return digest.hexdigest()


def trained(rank: int, fail_at: list[int], sizes: list[int], windows: int = 4) -> dict[str, Any]:
    """Windows in which rank 1 runs out of memory at the calls ``fail_at``, or with ``sizes`` set by hand."""
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    told: list[int] = []
    accumulator = Accumulator(
        model, optimizer, nn.MSELoss(), micro_batch_size=8, on_recovery=lambda recovery: told.append(recovery.window)
    )
    torch.manual_seed(rank)
    used = []
    for window in range(windows):
        if sizes:
            accumulator.micro_batch_size = sizes[window]
        batch = torch.randn(16 + 2 * rank, 6), torch.randn(16 + 2 * rank, 2)
        model.left, model.in_backward = fail_at[window] if rank == 1 and fail_at else 0, window > 1
        accumulator.step(batch)
        used.append(accumulator.micro_batch_size)
    return {"hash": hash_of(model, optimizer), "used": used, "told": told, "chance": float(torch.rand(()))}


def one_fails(rank: int, how: str) -> str:
    """Rank 1 fails in its second window: with an error, at one sample, by dying, or in its optimizer's step."""
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    error = OUT if how == "memory" else ValueError("a shape bug")
    loss_fn = Fails(2 if rank == 1 and how in ("memory", "error") else 0, error)
    accumulator = Accumulator(model, optimizer, loss_fn, micro_batch_size=1 if how == "memory" else 8)
    batch = (torch.ones(1, 6), torch.ones(1, 2))
    accumulator.step(batch)
    if rank == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "batch":
        batch = (torch.ones(1, 6), torch.ones(3, 2))
    if rank == 1 and how == "step":
        optimizer.step = lambda: (_ for _ in ()).throw(ValueError("a broken step"))  # type: ignore[method-assign]
    started_s = time.monotonic()
    accumulator.step(batch)
    return f"went on after {time.monotonic() - started_s:.0f} s"


def buffers(rank: int, kind: str) -> list[list[float]]:
    """The statistics of batch norm after two windows."""
    model = Noisy()
    model = DistributedDataParallel(model) if kind == "ddp" else model
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=8)
    torch.manual_seed(rank)
    for _ in range(2):
        accumulator.step((torch.randn(16, 6), torch.randn(16, 2)))
    accumulator._together.begin()
    return [[round(value, 5) for value in buffer.flatten().tolist()] for buffer in model.buffers()]


def unequal_models(rank: int) -> None:
    model = nn.Linear(6, 2 + rank)
    Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=4)


def sparse(rank: int) -> None:
    model = nn.Embedding(6, 2, sparse=True)
    Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=4)


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, samples: int) -> None:
        chance = torch.Generator().manual_seed(5)
        self.x = torch.randn(samples, 6, generator=chance).double()
        self.y = torch.randn(samples, 2, generator=chance).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Interrupted(Exception):
    """Raised by a callback, on every rank."""


class Seen(nn.Module):
    """Adds the mean of all that it has seen, which no rank tells another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.total += x.detach().mean(0)
        return x + self.total


def fitted(
    rank: int, folder: str | None, micro: list[int], dropout: float, stop_at: int | None, kind: str = ""
) -> dict[str, Any]:
    """Two epochs of 23 samples at an effective batch of 7, stopped after the window ``stop_at``."""
    torch.manual_seed(0)
    seen = [Seen()] if kind == "fsdp with buffers" else []
    layers = [nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 2), *seen]
    model = wrapped(nn.Sequential(*layers).double(), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    samples: list[int] = []

    def callback(event: Event) -> None:
        if event.window is not None:
            samples.append(event.window.samples)
            if event.windows == stop_at:
                raise Interrupted

    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        effective_batch_size=7,
        micro_batch_size=micro[rank],
        checkpoint=folder,
        checkpoint_every=None if folder is None else 1,
        callbacks=[callback],
        progress=False,
    )
    torch.manual_seed(rank)
    try:
        report = trainer.fit(Rows(23), epochs=2, eval_dataset=Rows(11))
    except Interrupted:
        return {"samples": samples}
    return {
        "hash": hash_of(model, optimizer),
        "samples": samples,
        "weights": whole(model[0].weight).flatten().tolist(),
        "losses": list(report.losses),
        "eval": [(found.loss, found.samples) for found in report.evaluations],
        "plan": None if report.plan is None else str(report.plan),
    }


class Unmade:
    """A part that cannot be saved where it ``fails``."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise ValueError("nothing to save")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing."""


def unmade(rank: int, folder: str, at: int) -> None:
    """A sharded run, a part of whose checkpoint fails on one rank."""
    model = wrapped(nn.Linear(6, 2).double(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extra_state = {"part": Unmade(rank == at)}
    Trainer(
        model, optimizer, nn.MSELoss(), micro_batch_size=2, checkpoint=folder, extra_state=extra_state, progress=False
    ).fit(Rows(8))


def terminated(rank: int, folder: str) -> int:
    """Rank 1 alone is asked to end, in its third window: every rank ends after it."""
    windows = 0

    def callback(event: Event) -> None:
        nonlocal windows
        windows = event.windows
        if rank == 1 and event.window is not None and event.windows == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    model = nn.Linear(6, 2).double()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        effective_batch_size=7,
        micro_batch_size=2,
        checkpoint=folder,
        callbacks=[callback],
        progress=False,
    )
    try:
        trainer.fit(Rows(50), epochs=2)
    except SystemExit as ended:
        return 1000 * windows + int(str(ended.code))
    return windows


def unlike(rank: int, what: str) -> None:
    """The ranks fit with another value of ``what``."""
    one = rank == 1
    model = nn.Linear(6, 2).double()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        effective_batch_size=14 if one and what == "effective_batch_size" else 7,
        micro_batch_size=2,
        seed=rank if what == "seed" else 0,
        checkpoint="/nowhere" if one and what == "checkpoint" else None,
        progress=False,
    )
    eval_dataset = Rows(5) if one and what == "eval_dataset" else None
    trainer.fit(Rows(9 if one and what == "dataset" else 8), eval_dataset=eval_dataset)


def halved(rank: int, samples: list[int]) -> int:
    """Rank 0 runs out of memory in its only window; how large another rank's micro-batches are then."""
    model = nn.Linear(6, 2)
    loss_fn = Fails(1 if rank == 0 else 0, OUT)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=8)
    mine = (torch.ones(samples[rank], 6), torch.ones(samples[rank], 2))
    accumulator.step(*([mine] if samples[rank] else []))
    return accumulator.micro_batch_size


class Head(nn.Module):
    """A loss with weights of its own, which differ from rank to rank before they are made equal."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.linear = nn.Linear(2, 2)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.linear(output), target)


def loss_weights(rank: int, kind: str) -> list[float]:
    """The weights of the loss after a window."""
    torch.manual_seed(0)
    model, head = wrapped(nn.Linear(6, 2), kind), Head(rank)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    Accumulator(model, optimizer, head, micro_batch_size=2).step((torch.ones(3 + rank, 6), torch.ones(3 + rank, 2)))
    return head.linear.weight.flatten().tolist()


def masked(rank: int) -> list[float]:
    """A sharded model whose rank 1 has a micro-batch without a term, the mean of which is no number."""
    torch.manual_seed(0)
    model = wrapped(nn.Linear(6, 2), "fsdp")
    accumulator = Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda output, mask: (output * mask).sum() / mask.sum(),
        micro_batch_size=2,
        count=lambda batch: batch[1].sum(),
    )
    mask = torch.ones(4, 2)
    if rank == 1:
        mask[2:] = 0
    accumulator.step((torch.ones(4, 6), mask))
    return whole(model.weight).flatten().tolist()


class Failing(Rows):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise ValueError("an unreadable sample")


def evaluated(rank: int) -> float:
    """Rank 1 cannot read what it evaluates."""
    model = nn.Linear(6, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), micro_batch_size=2, progress=False)
    return trainer.evaluate(Failing(8) if rank == 1 else Rows(8), batch_size=2).loss
