"""Steps per second of Accumulator and Trainer beside a loop written by hand, Lightning and the HF Trainer.

All train the same small transformer with the same effective batch in the same micro-batches: here on the CPU, by
``benchmarks/throughput.py`` on a GPU. They take
turns in short blocks, in an order that is drawn anew each round; what is compared is the time from the end of a block's
first window to the end of its last, so that no start-up counts. A block is within the first 32 windows of a Trainer,
all of which measure the noise scale; later it is one in four. The figure is the median over the rounds of the loop's
time divided by the contender's (above 1: faster than by hand), with the 95 % interval of a bootstrap of that median::

    python -m benchmarks.training [--rounds 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from benchmarks.measure import Place, environment
from benchmarks.records import RESULTS

MICRO, STEPS, WINDOWS = 8, 4, 6  # the first window of a block is not timed
EFFECTIVE = MICRO * STEPS
TOKENS, CLASSES, WIDTH, LAYERS = 64, 512, 256, 4

Clock = Callable[[], None]
"""Is called at the end of every window."""
Contender = Callable[[TensorDataset, str], Callable[[Clock], None]]
"""From the data and the device to what trains one block on it."""


class Model(nn.Module):
    """A small language model that gives its logits, or its loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(self.embedding(input_ids)))
        return logits if labels is None else {"loss": loss_of(logits, labels), "logits": logits}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def made(device: str) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model().to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def by_hand(data: TensorDataset, device: str) -> Callable[[Clock], None]:
    model, optimizer = made(device)

    def block(clock: Clock) -> None:
        model.train()
        batches = iter(DataLoader(data, MICRO, shuffle=True))
        for _ in range(WINDOWS):
            total = torch.zeros((), device=device)
            for _ in range(STEPS):
                x, y = (part.to(device) for part in next(batches))
                loss = loss_of(model(x), y) / STEPS
                loss.backward()
                total = total + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock()

    return block


def accumulator(data: TensorDataset, device: str) -> Callable[[Clock], None]:
    model, optimizer = made(device)
    ours = autobatch.Accumulator(model, optimizer, loss_of, micro_batch_size=MICRO, max_grad_norm=1.0)

    def block(clock: Clock) -> None:
        model.train()
        for batch in DataLoader(data, EFFECTIVE, shuffle=True):
            ours.step(batch)
            clock()

    return block


def trainer(noise: bool) -> Contender:
    def contender(data: TensorDataset, device: str) -> Callable[[Clock], None]:
        model, optimizer = made(device)
        clocks: list[Clock] = []
        ours = autobatch.Trainer(
            model,
            optimizer,
            loss_of,
            effective_batch_size=EFFECTIVE,
            micro_batch_size=MICRO,
            max_grad_norm=1.0,
            progress=False,
            noise=noise,
            callbacks=[lambda event: clocks[0]() if event.kind == "window" else None],
        )

        def block(clock: Clock) -> None:
            clocks[:] = [clock]
            ours.fit(data)

        return block

    return contender


def lightning(data: TensorDataset, device: str) -> Callable[[Clock], None]:
    import lightning

    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, optimizer = made(device)
    clocks: list[Clock] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer

    class Clocked(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if (index + 1) % STEPS == 0:
                clocks[0]()

    def block(clock: Clock) -> None:
        clocks[:] = [clock]
        lightning.Trainer(
            max_epochs=1,
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            accumulate_grad_batches=STEPS,
            gradient_clip_val=1.0,
            callbacks=[Clocked()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(), DataLoader(data, MICRO, shuffle=True))

    return block


def transformers(data: TensorDataset, device: str) -> Callable[[Clock], None]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model, optimizer = made(device)
    folder = tempfile.TemporaryDirectory()
    clocks: list[Clock] = []

    class Clocked(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks[0]()

    def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = torch.utils.data.default_collate(rows)
        return {"input_ids": x, "labels": y}

    arguments = transformers.TrainingArguments(
        folder.name,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=STEPS,
        max_grad_norm=1.0,
        num_train_epochs=1,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,  # as everybody else
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def block(clock: Clock) -> None:
        assert folder  # it lives as long as this function
        clocks[:] = [clock]
        transformers.Trainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=data,
            optimizers=(optimizer, None),
            callbacks=[Clocked()],
        ).train()

    return block


CONTENDERS: dict[str, Contender] = {
    "by hand": by_hand,
    "Accumulator": accumulator,
    "Trainer": trainer(noise=True),
    "Trainer, noise=False": trainer(noise=False),
    "Lightning": lightning,
    "HF Trainer": transformers,
}


def seconds_of(block: Callable[[Clock], None]) -> float:
    """From the end of the first window to that of the last."""
    ends: list[float] = []

    def clock() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    block(clock)
    if len(ends) != WINDOWS:
        raise RuntimeError(f"{len(ends)} windows instead of {WINDOWS}")
    return ends[-1] - ends[0]


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95 %, by bootstrap."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def run(rounds: int, device: str = "cpu") -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads that wait for a busy core say nothing
    tokens = torch.randint(CLASSES, (WINDOWS * EFFECTIVE, TOKENS))
    data = TensorDataset(tokens, tokens.roll(-1, 1))
    blocks = {name: contender(data, device) for name, contender in CONTENDERS.items()}
    for block in blocks.values():
        seconds_of(block)  # what is made once
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(rounds):
        for name in random.Random(number).sample(list(blocks), k=len(blocks)):
            times[name].append(seconds_of(blocks[name]))
    rows = []
    for name, own in times.items():
        ratios = [hand / mine for hand, mine in zip(times["by hand"], own, strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "contender": name,
                "ratio": round(statistics.median(ratios), 4),
                "interval": [round(low, 4), round(high, 4)],
                "window_s": round(statistics.median(own) / (WINDOWS - 1), 5),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| trained by | steps per second / by hand | 95 % interval |", "|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        lines.append(f"| {row['contender']} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=RESULTS / "training.json")
    options = parser.parse_args()
    rows = run(options.rounds)
    about = {"rounds": options.rounds, "micro_batch_size": MICRO, "steps": STEPS, "threads": torch.get_num_threads()}
    found = {"environment": environment(Place(device="cpu")), "run": about, "rows": rows}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
