"""tune() and the callback AutoBatch for Lightning on a GPU: a ResNet with a scaler, GPT-2 at 1024 in DDP."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("lightning")

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

import autobatch
from autobatch.integrations.lightning import AutoBatch
from autobatch.probe.state import fingerprint
from autobatch.units import MIB
from tests.gpu.gpt2 import SIZES, gpt2
from tests.gpu.machines import in_new_process, ooms
from tests.gpu.values import room_for, warm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    print(f"lightning {version('lightning')}, torch {torch.__version__}")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def trainer_of(**options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        **{"accelerator": "gpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False} | quiet | options
    )


class Images(Dataset[Any]):
    def __init__(self, count: int = 4096) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index % 10


def images(count: int, batch_size: int, side: int) -> DataLoader[Any]:
    """They travel as bytes."""

    def collated(labels: list[int]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(labels), 3, side, side, dtype=torch.uint8), torch.tensor(labels)

    return DataLoader(Images(count), batch_size, collate_fn=collated)


class Classifier(lightning.LightningModule):
    def __init__(self, net: str) -> None:
        super().__init__()
        self.net = getattr(pytest.importorskip("torchvision.models"), net)()
        self.sizes: list[int] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].float(), batch[1]

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("error", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("net", "side", "card"),
    [
        ("resnet18", 112, "card_of_2_gb"),
        pytest.param("resnet50", 224, "card_of_24_gb", marks=pytest.mark.slow),
    ],
)
def test_a_resnet_in_mixed_precision_trains_at_what_was_found_and_not_at_more(
    request: pytest.FixtureRequest, net: str, side: int, card: str
) -> None:
    request.getfixturevalue(card)
    module, training, evaluation = Classifier(net), images(4096, 8, side), images(1024, 8, side)
    options = {"precision": "16-mixed", "gradient_clip_val": 1.0, "max_steps": 2, "limit_val_batches": 2}
    trainer = trainer_of(**options)
    scaler = trainer.precision_plugin.scaler
    before = fingerprint(module), scaler.state_dict(), torch.cuda.memory_allocated()
    found = autobatch.tune(trainer, module, (training, evaluation), headroom=0.1)
    assert (fingerprint(module), scaler.state_dict()) == before[:2]
    assert torch.cuda.memory_allocated() - before[2] < 1 << 20  # nothing of the trials is left on the device
    assert found.environment["trials_in"] == "this process"
    assert 64 <= found.batch_size == training.batch_size < 1024
    assert found.eval_batch_size is not None
    assert found.batch_size < found.eval_batch_size == evaluation.batch_size == 1024
    failures = ooms()
    trainer.fit(module, training, evaluation)
    assert (trainer.global_step, module.sizes, ooms()) == (2, [found.batch_size] * 2, failures)
    runs = (t for t in (*found.trials, *found.confirmation) if t.fits and t.mode == "train")
    peaks = {t.batch_size: t.measurement for t in runs if t.measurement}
    least, most = peaks[min(peaks)], peaks[found.batch_size]
    assert most.capacity_bytes is not None
    assert most.peak_reserved_bytes is not None
    assert most.peak_reserved_bytes > 0.8 * most.capacity_bytes, found
    # A little less than the budget's tenth more may run, with retries; what is larger than the card cannot.
    sample_bytes = (most.peak_allocated_bytes - least.peak_allocated_bytes) / (found.batch_size - min(peaks))
    too_many = found.batch_size + int(1.1 * (most.capacity_bytes / 0.9 - most.peak_allocated_bytes) / sample_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        trainer_of(**options).fit(module, images(4096, too_many, side))


class Writer(lightning.LightningModule):
    def __init__(self, size: str) -> None:
        super().__init__()
        self.net = gpt2(size)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_at_1024_in_ddp_trains_in_windows_of_64_without_running_out(
    card_of_24_gb: None, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Lightning leaves its rendezvous there
    module, loader = Writer(size), DataLoader(TensorDataset(torch.zeros(128, 1024, dtype=torch.long)), 4)
    callback, after = AutoBatch(effective_batch_size=64), After()
    options = {"precision": "bf16-mixed", "strategy": "ddp"}
    trainer = trainer_of(callbacks=[callback, after], **options)
    try:
        trainer.fit(module, loader)
        found = callback.result
        assert found is not None
        more = DataLoader(loader.dataset, int(found.batch_size * 1.3))
        with pytest.raises(torch.OutOfMemoryError):
            trainer_of(accumulate_grad_batches=2, **options).fit(module, more)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert trainer.accumulate_grad_batches * loader.batch_size == 64
    assert 4 <= loader.batch_size <= found.batch_size < 64
    assert (trainer.global_step, after.ooms, after.is_wrapped) == (2, 0, True)


class After(lightning.pytorch.Callback):
    """Looks at training after the search."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = ooms()
        self.is_wrapped = isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ooms = ooms() - self.before


class Manual(lightning.LightningModule):
    """Steps one part after the other, schedules them, and keeps what it has seen last."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.last = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def on_train_epoch_start(self) -> None:
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.toggle_optimizer(optimizer)
            output = self.last(self.first(batch[0]).relu())
            self.seen = [*self.seen[-1:], output.detach()]
            optimizer.zero_grad()
            self.manual_backward(mse_loss(output, batch[0]))
            optimizer.step()
            schedule.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters()) for part in (self.first, self.last)]
        # Enough for the longest trial, and far too few for all of them.
        return optimizers, [torch.optim.lr_scheduler.OneCycleLR(each, 0.1, total_steps=24) for each in optimizers]


def fail_amid_its_parts(precision: str) -> None:
    """Meant for a process of its own: holes that a past has left in segments would be much of 64 MiB."""
    warm()
    with room_for(64 * MIB):
        # Each sample is 16 of the model's rows: a batch has much on the GPU, and is soon put together.
        module, loader = Manual(), DataLoader(TensorDataset(torch.zeros(1 << 11, 16, 256)), 4)
        trainer = trainer_of(precision=precision, max_epochs=1, limit_train_batches=2)
        held, before = list[int](), (fingerprint(module), torch.cuda.memory_allocated())
        found = autobatch.tune(trainer, module, loader, on_trial=lambda _: held.append(torch.cuda.memory_allocated()))
        assert fingerprint(module) == before[0]
        assert torch.cuda.memory_allocated() - before[1] < 1 << 16
        assert found.oom_count
        assert max(held) - min(held) < 1 << 16  # what a trial keeps alive, the next has not
        assert not hasattr(module, "seen")
        assert {parameter.requires_grad for parameter in module.parameters()} == {True}
        assert 32 < found.batch_size == loader.batch_size < 1 << 10
        trainer.fit(module, loader)
        assert trainer.global_step == 4
    print("done")


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "16-mixed"])
def test_a_step_that_fails_amid_its_parts_leaves_nothing(precision: str) -> None:
    code = f"from tests.gpu.test_tune_lightning import fail_amid_its_parts; fail_amid_its_parts({precision!r})"
    assert in_new_process(code).splitlines()[-1] == "done"
