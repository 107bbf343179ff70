"""Recovery on real host memory, where torch's CPU allocator really fails and values are real."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, random
import numpy
import torch
import torch._dynamo  # as the first optimizer does: once here, and not in both
from torch import nn
import autobatch
from autobatch.device.host import HostDevice
from autobatch.probe.state import fingerprint
from autobatch.units import MIB

def trained(sizes):
    # In micro-batches of these sizes, or by itself from the first one on, under a limit.
    limited = len(sizes) == 1
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 1024), nn.Dropout(0.2), nn.ReLU(), nn.Linear(1024, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told, used = [], []
    accumulator = autobatch.Accumulator(
        model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=sizes[0], on_recovery=lambda r: told.append(r.window)
    )

    def train(windows):
        for window in windows:
            if not limited:
                accumulator.micro_batch_size = sizes[window]
            batch = torch.randn(8192, 8), torch.randint(8, (8192,))
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
    return {"used": used, "told": told, "hash": fingerprint(model, optimizer)}

def in_fork(sizes):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(trained(sizes)).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as answer:
        return json.load(answer)

limited = in_fork([256])
print(json.dumps({"limited": limited, "free": in_fork(limited["used"])}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux alone")
def test_a_window_that_runs_out_is_repeated_bit_for_bit_as_in_smaller_micro_batches() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["limited"]["told"]
    assert found["free"]["used"] == found["limited"]["used"]
    assert found["free"]["hash"] == found["limited"]["hash"]
