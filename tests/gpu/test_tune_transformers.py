"""tune() of a transformers Trainer on a card of 24 GB: GPT-2 at 1024 tokens through the library's own CUDA path."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import Tensor, nn

import autobatch
from autobatch.errors import DoesNotFitError
from autobatch.units import GIB
from tests.gpu.gpt2 import SIZES, gpt2
from tests.gpu.machines import ooms

pytestmark = pytest.mark.gpu
TOKENS = 1024


@pytest.fixture(autouse=True, scope="module")
def _versions() -> None:
    print(f"transformers {version('transformers')}, accelerate {version('accelerate')}, torch {torch.__version__}")


@pytest.fixture(autouse=True)
def _nothing_of_another_test() -> None:
    gc.collect()


class Texts(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.zeros(TOKENS, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, **options
    )


def writing(folder: Path, size: str, **options: Any) -> transformers.Trainer:
    args = arguments(folder, **options)
    return transformers.Trainer(gpt2(size), args, train_dataset=Texts(4096), eval_dataset=Texts(64))


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        pytest.param(
            {"fp16": True, "optim": "adamw_torch_fused", "gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_gpt2_trains_with_what_was_found_and_runs_out_above(
    tmp_path: Path, card_of_24_gb: None, size: str, options: dict[str, Any]
) -> None:
    trainer = writing(tmp_path, size, **options)
    result = autobatch.tune(trainer, effective_batch_size=128)
    args, before = trainer.args, ooms()
    trainer.train()
    trainer.evaluate()
    assert (trainer.state.global_step, ooms()) == (2, before)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert args.per_device_train_batch_size <= result.batch_size < 2 * args.per_device_train_batch_size
    assert args.per_device_eval_batch_size == result.eval_batch_size
    assert result.eval_batch_size is not None
    assert result.eval_batch_size > result.batch_size
    assert result.smallest_failure is not None
    del trainer
    more = math.ceil(1.2 * result.smallest_failure)  # which may have failed by the headroom alone
    options = {**options, "per_device_train_batch_size": more, "gradient_accumulation_steps": 4}
    with pytest.raises(torch.OutOfMemoryError):
        writing(tmp_path, size, **options).train()


class Pixels(torch.utils.data.Dataset[Any]):
    """Samples of 64 KiB."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(1 << 14), "labels": torch.zeros(())}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x[:, :256]).sum(1) - labels).square().mean()}


def test_the_inputs_of_two_windows_are_on_the_device(tmp_path: Path, little_memory: None) -> None:
    """Each time that the loop takes a window: so one of 15 MiB fits, and one of 35 MiB fits at no batch."""
    trainer = transformers.Trainer(Small(), arguments(tmp_path), train_dataset=Pixels())
    autobatch.tune(trainer, effective_batch_size=240, multiple_of="pow2")
    before = ooms()
    trainer.train()
    assert ooms() == before
    trainer = transformers.Trainer(Small(), arguments(tmp_path), train_dataset=Pixels())
    with pytest.raises(DoesNotFitError):
        autobatch.tune(trainer, effective_batch_size=560)
    trainer.args.gradient_accumulation_steps = 560 // trainer.args.per_device_train_batch_size
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


class Tagger(nn.Module):
    """Each sample has 8 MiB of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1 << 21)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": logits.sum() + labels.sum(), "logits": logits}


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(8), "labels": torch.zeros(())}


@pytest.fixture
def card_of_1_gb() -> Iterator[None]:
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + GIB) / total_bytes)
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def tagger(folder: Path, every: int | None) -> transformers.Trainer:
    args = arguments(folder, eval_accumulation_steps=every)
    return transformers.Trainer(
        Tagger(), args, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=lambda predictions: {}
    )


def test_outputs_that_metrics_need_are_alive_in_a_trial(tmp_path: Path, card_of_1_gb: None) -> None:
    """Those of the batches that the loop keeps, twice when the last are joined to the others."""
    trainer = tagger(tmp_path, 3)
    result = autobatch.tune(trainer, effective_batch_size=2)
    before = ooms()
    trainer.train()
    trainer.evaluate()
    assert ooms() == before
    assert result.eval_batch_size is not None
    trainer.args.per_device_eval_batch_size = int(1.5 * result.eval_batch_size)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.evaluate()


def test_outputs_that_do_not_fit_are_no_matter_of_the_batch(tmp_path: Path, card_of_1_gb: None) -> None:
    """Without ``eval_accumulation_steps`` the loop keeps 512 MiB of them, and joins the last to the others."""
    with pytest.raises(DoesNotFitError, match="an evaluation of batch 1 does not fit"):
        autobatch.tune(tagger(tmp_path, None), effective_batch_size=2)
    with pytest.raises(torch.OutOfMemoryError):
        tagger(tmp_path, None).evaluate()


def test_a_model_that_training_will_move_is_tried_there(tmp_path: Path, little_memory: None) -> None:
    """With evaluation in half precision the trainer leaves it on the host at first."""
    args = arguments(tmp_path, bf16_full_eval=True)
    trainer = transformers.Trainer(Small(), args, train_dataset=Pixels(), eval_dataset=Pixels())
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cpu"}
    result = autobatch.tune(trainer, effective_batch_size=16)
    assert result.environment["kind"] == "cuda"
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cpu"}
    trainer.train()
    assert trainer.state.global_step == 2
