"""tune() on a real GPU: the values of models and optimizers are as they were, and training learns afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import autobatch
from tests.gpu.values import DEVICE, bits, differing, seed_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu_values,
    pytest.mark.usefixtures("left_as_found"),
    pytest.mark.filterwarnings("ignore"),  # the trainers' own
]
WINDOW, STEPS = 32, 24
QUICK: dict[str, Any] = {"effective_batch_size": WINDOW, "start": 16}
"""Few trials, all of which fit: how a search ends is looked at elsewhere."""


class Signs(Dataset[Any]):
    """Whether the first of eight numbers is positive: learned in a few steps."""

    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(1)
        self.x = torch.randn(WINDOW * STEPS, 8, generator=chance)
        self.labels = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """Of everything that a step may change: weights, statistics, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def begun() -> tuple[Classifier, torch.optim.Optimizer]:
    """A model that has been trained a little, and its optimizer, which has a state."""
    seed_all()
    model = Classifier().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(8, 8, device=DEVICE), torch.ones(8, device=DEVICE, dtype=torch.long))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def has_learned(losses: list[float]) -> bool:
    """From a coin's 0.69 or more to clearly less, by thirds of the steps. A scaler may leave out the first few."""
    third = len(losses) // 3
    assert all(map(math.isfinite, losses))
    return sum(losses[-third:]) < 0.7 * sum(losses[:third])


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_a_trainer_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model, optimizer = begun()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = transformers.Trainer(model, args, train_dataset=Signs(), optimizers=(optimizer, schedule))
    scaler = [] if trainer.accelerator.scaler is None else [trainer.accelerator.scaler]
    before = bits(model, optimizer, schedule, *scaler)
    autobatch.tune(trainer, **QUICK)
    assert differing(before, bits(model, optimizer, schedule, *scaler)) == []
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert has_learned([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.fixture
def no_other_accelerator() -> Iterator[None]:
    state = pytest.importorskip("accelerate.state")

    def forget() -> None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_accelerator(no_other_accelerator: None, precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision=precision)
    model, optimizer, loader = accelerator.prepare(*begun(), DataLoader(Signs(), WINDOW, shuffle=True))
    scaler = [] if accelerator.scaler is None else [accelerator.scaler]
    before = bits(model, optimizer.optimizer, *scaler)
    autobatch.tune(accelerator, model, loader, optimizer=optimizer, **QUICK)
    assert differing(before, bits(model, optimizer.optimizer, *scaler)) == []
    losses: list[float] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert has_learned(losses)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_trainer_of_lightning(precision: str) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = begun()[0], list[float]()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, loader = Module(), DataLoader(Signs(), WINDOW, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    kind = "gpu" if torch.device(DEVICE).type == "cuda" else "cpu"
    trainer = lightning.Trainer(
        accelerator=kind, devices=1, max_epochs=1, precision=precision, enable_model_summary=False, **quiet
    )
    scaler = [] if getattr(trainer.precision_plugin, "scaler", None) is None else [trainer.precision_plugin.scaler]
    before = bits(module, *scaler)
    autobatch.tune(trainer, module, loader, **QUICK)
    assert differing(before, bits(module, *scaler)) == []
    module.losses.clear()
    trainer.fit(module, loader)
    assert trainer.global_step == STEPS
    assert has_learned(module.losses)
