"""Trainer on GPUs: what was found is enough to the end, and the run is what its plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autobatch import Trainer
from autobatch.training.events import Event
from tests.conftest import has_real_gpu

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent.parent
TRUTH: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "truth_cells.json").read_text())["cells"]
FEATURES = 256
ROWS = 1 << 10


def one(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices and AdamW for all else, as many train transformers."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others)]


@pytest.mark.parametrize("optimizers", [one, two])
def test_the_probe_comes_first_and_its_answer_lasts_to_the_end(little_memory, tmp_path: Path, optimizers: Any) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU()) for _ in range(4)]).cuda()
    optimizer = optimizers(model)
    # Each is 16 of the model's rows: a batch has much on the GPU, and is soon put together.
    rows = torch.utils.data.TensorDataset(torch.zeros(ROWS, 16, FEATURES), torch.zeros(ROWS, 16, FEATURES))
    events: list[Event] = []
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        effective_batch_size=ROWS,
        checkpoint=tmp_path,
        callbacks=[events.append],
        progress=False,
        find_options={"cache": None},
    )
    report = trainer.fit(rows, epochs=2, eval_dataset=rows)
    assert report.batch_size is not None
    assert 1 < report.batch_size.batch_size == report.micro_batch_size < ROWS
    assert [event.window.samples for event in events if event.window] == [ROWS] * 2
    assert not [event for event in events if event.kind == "recovered"]
    assert report.evaluations[0].batch_size > report.micro_batch_size
    again = Trainer(model, optimizer, nn.MSELoss(), effective_batch_size=ROWS, checkpoint=tmp_path, progress=False).fit(
        rows, epochs=2
    )
    assert (again.windows, again.batch_size) == (2, None)  # what was found is in the checkpoint


@pytest.mark.slow
@pytest.mark.skipif(has_real_gpu(), reason="a process of its own attaches a virtual card")
@pytest.mark.parametrize("cell", ["gpt2-16", "gpt2-24", "gpt2-40", "gpt2-80"])
def test_gpt2_trains_at_512_without_running_out(cell: str) -> None:
    """In at most 1.2 times the micro-batches that the largest batch of all would need."""
    script = str(Path(__file__).parent / "run_trainer.py")
    # This session's card is handed on to children; this one has a card of its own.
    ours = ("AUTOBATCH_VIRTUAL_STATE", "LD_PRELOAD", "LD_LIBRARY_PATH")
    clean = {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, cell, "512"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env=clean,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["windows"], found["recovered"], found["ooms_after_the_probe"]) == (3, 0, 0)
    needed = -(-512 // TRUTH[cell]["solid"])
    assert needed <= max(found["micro_batches"]) <= 1.2 * needed
