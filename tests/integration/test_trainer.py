"""Trainer in processes that are killed, and on real host memory under a limit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autobatch.device.host import CHILD_ENVIRONMENT

SCRIPT = Path(__file__).parent / "train_to_the_end.py"
ROOT = SCRIPT.parent.parent.parent


def started(folder: Path, every: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(SCRIPT), str(folder), str(every)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return out


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    expected = finished(started(tmp_path / "whole", 3))
    chance, killed, amid = random.Random(kills), 0, 0
    while killed < kills:
        folder = tmp_path / f"run-{killed}"
        process = started(folder, 1)
        until_s = time.monotonic() + 60
        while not list(folder.glob("window-*")) and process.poll() is None and time.monotonic() < until_s:
            time.sleep(0.005)
        # From before the first window to about the last.
        time.sleep(chance.random() * 0.7)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        amid += len(list(folder.glob(".unfinished-*"))) > 0 or process.returncode == -signal.SIGKILL
        assert finished(started(folder, 2)) == expected
        assert not list(folder.glob(".unfinished-*"))
    assert amid >= kills / 2


def test_sigterm_to_the_whole_group_writes_a_checkpoint_with_workers_too(tmp_path: Path) -> None:
    """As torchrun, systemd and Slurm send it: to the processes that load samples as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(SCRIPT), str(tmp_path), "1000", "2"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "window 3\n"
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    kept = [path.name for path in tmp_path.glob("window-*")]
    assert "window-00000000" in kept
    assert len(kept) == 2


LIMITED = """
import json, sys
import torch
from torch import nn
import autobatch
from autobatch.units import MIB

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 512
    def __getitem__(self, index):
        return torch.full((8,), index / 8192), index % 8

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8192), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8192, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
events = []
trainer = autobatch.Trainer(
    model, optimizer, nn.CrossEntropyLoss(), effective_batch_size=256, progress=False, callbacks=[events.append],
    find_options={"memory_limit": 20 * MIB, "cache": None, "multiple_of": "pow2"},
)
report = trainer.fit(Rows(), epochs=1, eval_dataset=Rows())
print(json.dumps({
    "micro": report.micro_batch_size, "found": report.batch_size.batch_size, "plan": str(report.plan),
    "eval": report.evaluations[0].batch_size, "windows": report.windows,
    "recovered": sum(event.kind == "recovered" for event in events),
    "modes": sorted({trial.mode for trial in report.batch_size.trials}),
}))
"""


def test_the_probe_comes_first_and_its_answer_is_used() -> None:
    environment = {**os.environ, **CHILD_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["micro"] == found["found"] < 256  # a sample has 160 KiB of activations
    assert found["recovered"] == 0
    assert found["windows"] == 2
    assert found["plan"].startswith("256 = ")
    assert found["eval"] > found["micro"]
    assert found["modes"] == ["eval", "train"]
