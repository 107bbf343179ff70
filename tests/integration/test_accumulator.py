"""Recovery on real host memory, where torch's CPU allocator really fails and values are real."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, random, sys
import numpy
import torch
from torch import nn
import autobatch
from autobatch.device.host import HostDevice
from autobatch.probe.state import fingerprint
from autobatch.units import MIB

limited = sys.argv[1] == "limited"
sizes = json.loads(sys.argv[2])
torch.manual_seed(0)
random.seed(0)
numpy.random.seed(0)
model = nn.Sequential(nn.Linear(64, 1024), nn.Dropout(0.2), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
told = []
accumulator = autobatch.Accumulator(
    model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=sizes[0], on_recovery=lambda r: told.append(r.window)
)
used = []

def train(windows):
    for window in windows:
        if not limited:
            accumulator.micro_batch_size = sizes[window]
        batch = torch.randn(8192, 64), torch.randint(8, (8192,))
        accumulator.step(batch)
        used.append(accumulator.micro_batch_size)

if limited:
    train([0])  # what torch keeps is there, and the limit counts from here
    accumulator.micro_batch_size = 8192
    device = HostDevice()
    device.begin()
    with device.restrict(80 * MIB):
        train([1, 2])
else:
    train([0, 1, 2])
print(json.dumps({"used": used, "told": told, "hash": fingerprint(model, optimizer)}))
"""


def run(*arguments: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux alone")
def test_a_window_that_runs_out_is_repeated_bit_for_bit_as_in_smaller_micro_batches() -> None:
    limited = run("limited", "[256]")
    assert limited["told"]
    assert run("free", json.dumps(limited["used"]))["hash"] == limited["hash"]
