"""Set-ups that people have, in which tune() was wrong once or said nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autobatch
from autobatch.errors import AutobatchWarning, InvalidArgumentError, UnsupportedTrainerError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux alone")
FEW: dict[str, Any] = {"memory_limit": "100MiB", "start": 8}


def rows(samples: int) -> TensorDataset:
    return TensorDataset(torch.ones(samples, 8), torch.zeros(samples, dtype=torch.long))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 2)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.training_step(batch, index)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(lightning.LightningDataModule):
    """Training follows ``batch_size``; evaluation has few samples, in batches of ``fixed`` or as training's."""

    def __init__(self, fixed: int | None) -> None:
        super().__init__()
        self.batch_size, self.fixed = 4, fixed

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(rows(96), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(rows(7), self.fixed or self.batch_size)


def lightning_trainer(**options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options)


@pytest.mark.parametrize("fixed", [None, 128])
def test_a_short_evaluation_is_no_limit_of_memory(fixed: int | None) -> None:
    trainer, data = lightning_trainer(), Data(fixed)
    autobatch.tune(trainer, Module(), data, effective_batch_size=96, **FEW)
    assert (data.batch_size, trainer.accumulate_grad_batches) == (96, 1)
    trainer.fit(Module(), data)
    assert trainer.global_step == 1


def test_an_interval_that_counts_micro_batches_is_refused_before_the_search() -> None:
    trainer, loader = lightning_trainer(val_check_interval=2), DataLoader(rows(96), 4)
    with pytest.raises(UnsupportedTrainerError, match="val_check_interval=2 counts micro-batches"):
        autobatch.tune(trainer, Module(), loader, effective_batch_size=96, **FEW)
    assert loader.batch_size == 4


def accelerated(*, samples: int = 64) -> dict[str, Any]:
    accelerator, model = Accelerator(cpu=True), nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(samples), 4))
    return {"trainer": accelerator, "model": model, "data": loader, "optimizer": optimizer}


def tune_accelerated(**given: Any) -> Any:
    return autobatch.tune(**given, loss_fn=nn.functional.cross_entropy, **FEW)


@pytest.mark.parametrize(
    ("samples", "effective", "said"),
    [
        (64, 128, "The data set has 64 samples, fewer than an optimizer step of 128"),
        (300, 257, "has no divisor near 64"),
    ],
)
def test_what_is_likely_not_meant_is_warned_of(samples: int, effective: int, said: str) -> None:
    with pytest.warns(AutobatchWarning, match=said):
        result = tune_accelerated(
            **accelerated(samples=samples), effective_batch_size=effective, max_batch_size=min(samples, 64)
        )
    assert any(said in note for note in result.notes)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one that has parameters of the model"):
        tune_accelerated(**accelerated() | {"optimizer": accelerated()["optimizer"]})


def test_a_stream_is_called_one_however_it_was_prepared() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows(8))

    given = accelerated()
    stream = given["trainer"].prepare(DataLoader(Stream(), 4))
    with pytest.raises(UnsupportedTrainerError, match="reads Stream, a stream"):
        tune_accelerated(**given | {"data": stream})


class Texts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [3, 4, 5], "labels": [3, 4]}


def test_evaluation_that_generates_does_so_as_the_trainer_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, heard = transformers.T5ForConditionalGeneration(config), tmp_path / "heard"

    def generate(self: Any, **options: Any) -> Any:
        with heard.open("a") as file:  # trials are in forks of this process
            file.write(f"{options.get('max_length')} {options.get('num_beams')}\n")
        return torch.zeros(len(options["input_ids"]), 2, dtype=torch.long)

    monkeypatch.setattr(type(model), "generate", generate)
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path / "out"),
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Seq2SeqTrainer(
        model,
        args,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        data_collator=transformers.default_data_collator,
        compute_metrics=lambda predicted: {},
    )
    autobatch.tune(trainer, max_batch_size=2, start=2, memory_limit="300MiB")
    assert set(heard.read_text().splitlines()) == {"6 2"}
    assert not hasattr(trainer, "_gen_kwargs")


def test_a_trainer_that_generates_what_it_trains_on_is_refused(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.num_generations = 8  # as those of trl's GRPOTrainer and RLOOTrainer
    trainer = transformers.Trainer(nn.Linear(1, 1), args, train_dataset=Texts())
    with pytest.raises(UnsupportedTrainerError, match="generates what it trains on"):
        autobatch.tune(trainer)
