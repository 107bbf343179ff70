"""tune() of an engine of Ignite on a GPU of 24 GB: ResNet-50 in mixed precision, and GPT-2 at 1024 in windows of 64."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("ignite")

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

import autobatch
from autobatch.integrations.ignite import AutoBatch, update
from autobatch.probe.state import fingerprint
from tests.gpu.gpt2 import SIZES, gpt2
from tests.gpu.machines import ooms

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _given_back(card_of_24_gb: None) -> Iterator[None]:
    print(f"pytorch-ignite {version('pytorch-ignite')}, torch {torch.__version__}")
    yield
    gc.collect()


class Images(Dataset[Any]):
    """As they are decoded: on the host a quarter of what they are on the device."""

    image = torch.zeros(3, 224, 224, dtype=torch.uint8)

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Any:
        return self.image, 0


def on_device(batch: Any, device: Any, non_blocking: bool) -> Any:
    images, targets = batch
    return images.to(device).float(), targets.to(device)


@pytest.mark.slow
def test_resnet50_with_its_own_step_trains_at_what_was_found_and_not_at_more() -> None:
    """Found when the run starts, which is in this process: the engine's own scaler is put back too."""
    with torch.device("cuda"):
        model = pytest.importorskip("torchvision.models").resnet50()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn, scaler = nn.CrossEntropyLoss(), torch.amp.GradScaler("cuda")
    options = {"amp_mode": "amp", "scaler": scaler, "prepare_batch": on_device}
    engine = create_supervised_trainer(model, optimizer, loss_fn, "cuda", **options)
    loader = DataLoader(Images(), 8, shuffle=True)
    handler = AutoBatch(model, optimizer, loader)
    handler.attach(engine)
    before: list[Any] = [fingerprint(model, optimizer, scaler, torch_device="cuda")]
    steps: list[int] = []

    @engine.on(Events.STARTED)
    def look() -> None:
        before.append(fingerprint(model, optimizer, scaler, torch_device="cuda"))
        before.append(ooms())
        optimizer.register_step_post_hook(lambda *_: steps.append(engine.state.iteration))

    engine.run(loader, epoch_length=2)
    found = handler.result
    assert found is not None
    assert before[0] == before[1]
    assert ooms() == before[2]
    assert steps == [1, 2]
    assert loader.batch_size == found.batch_size
    assert 64 <= found.batch_size < 1024
    engine.state.max_epochs = None
    engine.logger.disabled = True
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(DataLoader(Images(), int(found.batch_size * 1.3)), epoch_length=1)


class Loss(nn.Module):
    """GPT-2 that takes its ids and returns its loss."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.model = gpt2(size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_at_1024_trains_in_windows_of_64_without_running_out(size: str) -> None:
    model = Loss(size).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    accumulator = autobatch.Accumulator(model, optimizer, micro_batch_size=1, precision="bf16", max_grad_norm=1.0)
    engine, loader = Engine(update(accumulator)), DataLoader(torch.zeros(128, 1024, dtype=torch.long), 4)
    before = fingerprint(model, optimizer, torch_device="cuda")
    found = autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=64)
    assert fingerprint(model, optimizer, torch_device="cuda") == before
    assert (loader.batch_size, accumulator.micro_batch_size) == (
        64,
        found.environment["accumulation"]["micro_batch_size"],
    )
    assert 4 <= accumulator.micro_batch_size <= found.batch_size < 64
    failures = ooms()
    engine.run(loader)
    assert (engine.state.iteration, accumulator.windows, ooms()) == (2, 2, failures)
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.rehearse([torch.zeros(int(found.batch_size * 1.3), 1024, dtype=torch.long)] * 2)
