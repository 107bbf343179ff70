"""Accumulated gradients, and windows that really run out of memory and are repeated, by their values on a real GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autobatch import Accumulator, Trainer
from autobatch.training.events import Event
from autobatch.training.recovery import Recovery
from autobatch.units import MIB
from tests.gpu.values import DEVICE, bits, differing, room_for, seed_all, warm
from tests.unit.test_accumulator import (
    Kept,
    assert_same,
    full_batch,
    gradients,
    ragged,
    tied,
    token_mean,
    tokens_in,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu_values,
    pytest.mark.usefixtures("deterministic", "left_as_found"),
    pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning"),  # of batch norm, which is here on purpose
]
SHORT, LONG, ROWS = 8, 1024, 64
ROOM = 128 * MIB  # for the long rows at once, whose activations take 64 MiB each in float and 32 MiB in half


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize(("samples", "size"), [(12, 12), (12, 5), (7, 3), (11, 1)])
def test_masked_tokens_in_uneven_parts_are_the_full_batchs(samples: int, size: int, place: str) -> None:
    """A mean over the tokens of the window, in double precision: to rounding. Counted where the batch is."""
    model, batch = tied().to(DEVICE), on(place, ragged(samples, seed=samples))
    ours = gradients(model, token_mean, batch, size, count=tokens_in)
    assert_same(ours, full_batch(model, token_mean, on(DEVICE, batch)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_in_uneven_parts_are_the_full_batchs(reduction: str) -> None:
    seed_all()
    model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 7)).double().to(DEVICE)
    batch = on(DEVICE, (torch.randn(53, 33).double(), torch.randn(53, 7).double()))
    loss_fn = nn.MSELoss(reduction=reduction)
    assert_same(gradients(model, loss_fn, batch, 16, reduction=reduction), full_batch(model, loss_fn, batch))


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-5), ("bf16", 0.03), ("fp16", 0.01)])
def test_in_every_precision_they_are_the_full_batchs(precision: str | None, tolerance: float) -> None:
    """Against the full batch in single precision: a number in half precision has 8 or 11 bits, and so has a sum."""
    seed_all()
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 50)).to(DEVICE)
    tokens, labels = torch.randint(50, (52, 24)), torch.randint(50, (52, 24))
    lengths = torch.linspace(1, 24, 52).long()[:, None]  # the last micro-batch has many times the tokens of the first
    batch = tokens, labels.masked_fill(torch.arange(24) >= lengths, -100)
    expected = flat(full_batch(model, token_mean, on(DEVICE, batch)))
    options: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        options["scaler"] = torch.amp.GradScaler(torch.device(DEVICE).type, init_scale=2.0**12)
    found = flat(gradients(model, token_mean, batch, 8, **options, count=tokens_in))
    assert (found - expected).norm() <= tolerance * expected.norm()
    by_samples = flat(gradients(model, token_mean, batch, 8, **options))
    assert (by_samples - expected).norm() > 0.2 * expected.norm()  # the control: a mean of means


def on(place: str, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.to(place) for part in batch)


def flat(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part.flatten() for part in parts if part is not None])


class Reader(nn.Module):
    """Draws random numbers, changes buffers, and keeps for backward what goes with the length of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 256), nn.Linear(256, 16), nn.BatchNorm1d(16)
        self.body, self.last = nn.Sequential(nn.GELU(), nn.Dropout(0.3)), nn.Linear(16, 4)

    def forward(self, rows: Tensor) -> Tensor:
        answer: Tensor = self.last(self.norm(self.second(self.body(self.first(rows))).mean(1)))
        return answer


class Run:
    """A run of the Accumulator, and the shapes that its model was given."""

    def __init__(self, precision: str | None) -> None:
        seed_all()
        warm()
        self.told: list[Recovery] = []
        self.shapes: list[tuple[int, int]] = []
        self.model = Reader().to(DEVICE)
        self.model.register_forward_pre_hook(lambda _, inputs: self.shapes.append(tuple(inputs[0].shape[:2])))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        scaler = torch.amp.GradScaler(torch.device(DEVICE).type, init_scale=256.0) if precision == "fp16" else None
        self.accumulator = Accumulator(
            self.model,
            optimizer,
            nn.MSELoss(),
            micro_batch_size=ROWS,
            precision=precision,
            scaler=scaler,
            max_grad_norm=1.0,
            on_recovery=self.told.append,
        )
        self.stateful = [self.model, optimizer, *([] if scaler is None else [scaler])]

    def step(self, *lengths: int) -> Tensor:
        return self.accumulator.step(*[rows_of(length) for length in lengths]).loss.cpu()


def rows_of(length: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, 16, generator=chance), torch.randn(rows, 4, generator=chance)


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_a_window_that_ran_out_half_way_is_that_of_the_smaller_micro_batch(precision: str | None) -> None:
    """Bit for bit, and so is all that comes after: weights, statistics, the optimizer's state, what dropout draws."""
    ours = Run(precision)
    ours.step(SHORT)
    with room_for(ROOM):
        losses = [ours.step(SHORT, LONG), ours.step(SHORT)]
    assert {recovery.window for recovery in ours.told} == {1}
    assert ours.shapes[1:3] == [(ROWS, SHORT), (ROWS, LONG)]  # it ran out after a micro-batch that was done

    theirs = Run(precision)
    theirs.step(SHORT)
    theirs.accumulator.micro_batch_size = ours.accumulator.micro_batch_size
    assert ours.accumulator.micro_batch_size == ours.told[-1].next_micro_batch_size < ROWS
    expected = [theirs.step(SHORT, LONG), theirs.step(SHORT)]
    assert theirs.told == []
    assert [torch.equal(one, other) for one, other in zip(losses, expected, strict=True)] == [True, True]
    assert differing(bits(*theirs.stateful), bits(*ours.stateful)) == []


def test_the_smaller_micro_batch_is_another_run() -> None:
    """The control: rounding, statistics and what dropout draws differ, so bits can tell."""
    whole, halved = Run(None), Run(None)
    halved.accumulator.micro_batch_size = ROWS // 2
    for run in (whole, halved):
        run.step(SHORT)
    assert len(differing(bits(*whole.stateful), bits(*halved.stateful))) > 10


class Rows(Dataset[Any]):
    """Three windows of 32, in micro-batches of 16; the second micro-batch of the second window is long."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chance = torch.Generator().manual_seed(index)
        length = 4 * LONG if 48 <= index < 64 else SHORT
        return torch.randn(length, 16, generator=chance), torch.randn(4, generator=chance)


def trainer_of(*callbacks: Callable[[Event], None]) -> tuple[Trainer, list[Any]]:
    seed_all()
    warm()
    model = Reader().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        scheduler=schedule,
        effective_batch_size=32,
        micro_batch_size=16,
        shuffle=False,
        progress=False,
        callbacks=callbacks,
    )
    return trainer, [model, optimizer, schedule]


def test_a_trainer_goes_on_as_one_that_took_the_smaller_micro_batch_from_there() -> None:
    events: list[Event] = []
    ours, its = trainer_of(events.append)
    with room_for(ROOM):
        report = ours.fit(Rows())
    told = [event.recovery for event in events if event.recovery]
    assert {recovery.window for recovery in told} == {1}
    assert [event.window.samples for event in events if event.window] == [32, 32, 32]
    size = told[-1].next_micro_batch_size

    def smaller(event: Event) -> None:
        if event.kind == "window" and event.windows == 1:
            theirs._accumulator.micro_batch_size = size

    theirs, of_theirs = trainer_of(smaller)
    assert theirs.fit(Rows()).losses == report.losses
    assert differing(bits(*of_theirs), bits(*its)) == []


def test_gradients_of_a_window_that_was_repeated_are_those_of_its_samples() -> None:
    """Without batch norm and dropout they are the full batch's, however often it ran out."""
    seed_all()
    warm()
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 4)).to(DEVICE)
    rows = torch.randn(ROWS, LONG, 16), torch.randn(ROWS, LONG, 4)
    optimizer, told = Kept(model.parameters(), lr=0.1), list[Recovery]()
    accumulator = Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=ROWS, on_recovery=told.append)
    with room_for(96 * MIB):
        accumulator.step(rows)
    assert told
    expected = flat(full_batch(model, nn.MSELoss(), on(DEVICE, rows)))
    assert (flat(optimizer.kept) - expected).norm() <= 1e-5 * expected.norm()
