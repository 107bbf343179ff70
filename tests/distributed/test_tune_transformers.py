"""tune() of a transformers Trainer across ranks: each tries its own steps, all get the same numbers and train on."""

from __future__ import annotations

import gc
import os
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers

import autobatch
from autobatch.probe import inquiry
from autobatch.probe.state import fingerprint
from tests.distributed.launch import Job
from tests.integration.tune_transformers import Classifier, classes, collated

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True, scope="module")
def _versions() -> None:
    print(f"transformers {version('transformers')}, accelerate {version('accelerate')}, torch {torch.__version__}")


def made(rank: int, folder: str, seen: list[list[int]], **options: Any) -> transformers.Trainer:
    """A trainer of this rank, which notes the labels of each of its optimizer steps."""
    # What a launcher says; the process group is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    class Noting(transformers.Trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            window, items = super().get_batch_samples(*args, **kwargs)
            seen.append([len(batch["labels"]) for batch in window])
            return window, items

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert len(self.accelerator.gather_for_metrics(inputs["labels"])) == 2 * len(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        ddp_backend="gloo",
        max_steps=2,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    trainer = Noting(Classifier(), args, collated, classes(), classes())
    trainer.remove_callback(transformers.PrinterCallback)  # what a rank prints is its answer to the test
    return trainer


def tuned(rank: int, folder: str, limits: list[int]) -> dict[str, Any]:
    inquiry.CONFIRM_STEPS = 2
    gc.freeze()  # every trial collects garbage, and these libraries are large
    seen: list[list[int]] = []
    trainer = made(rank, folder, seen)
    with torch.no_grad():
        if rank:
            next(trainer.model.parameters()).add_(1.0)  # which DistributedDataParallel will replace; tune() must not
    before = fingerprint(trainer.model)
    result = autobatch.tune(
        trainer, effective_batch_size=64, memory_limit=f"{limits[rank]}MiB", multiple_of="pow2", max_batch_size=32
    )
    assert fingerprint(trainer.model) == before
    assert not seen  # forks of this process
    trainer.train()
    args, trained = trainer.args, fingerprint(*trainer.model.state_dict().values())
    numbers = {
        name: getattr(args, name)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
    }
    made_by_hand = made(rank, folder, [], **numbers)
    made_by_hand.train()
    return {
        "numbers": numbers,
        "step": [sum(window) for window in seen],
        "global_step": trainer.state.global_step,
        "same": fingerprint(*made_by_hand.model.state_dict().values()) == trained,
        "weights": trained,
        "ranks": result.environment["ranks"],
    }


def uneven(rank: int, folder: str) -> None:
    autobatch.tune(made(rank, folder, []), effective_batch_size=33)


@pytest.mark.slow
def test_ranks_get_the_same_numbers_and_train_on(two: Job, tmp_path: Any) -> None:
    first, second = two.results(tuned, folder=str(tmp_path), limits=[120, 60])
    assert first == second
    assert first["same"]
    assert first["step"] == [32, 32]
    assert first["global_step"] == 2
    numbers = first["numbers"]
    assert numbers["per_device_train_batch_size"] * numbers["gradient_accumulation_steps"] * 2 == 64
    assert first["ranks"] == 2


def test_shares_must_be_equal(two: Job, tmp_path: Any) -> None:
    for rank in two.run(uneven, folder=str(tmp_path)):
        assert rank["error"] == "UnsupportedTrainerError"
        assert "effective_batch_size=33: must be a multiple of 2" in rank["message"]
