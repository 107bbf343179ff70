"""Several processes on one virtual GPU: each sees what the others hold, and the dead hold nothing."""

import os
import signal
import subprocess
import sys

import pytest

from autobatch.units import GIB, MIB
from autobatch.virtual.device import VirtualGPU

pytestmark = pytest.mark.gpu

CARD = "memory=40GiB,capability=8.0,outside=512MiB"
HOLDS_HALF = """
import sys, torch
held = torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
print("holding", flush=True)
sys.stdin.read()
"""
LOOKS = """
import pynvml, torch
free, total = torch.cuda.mem_get_info()
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
print(free >> 20, pynvml.nvmlDeviceGetMemoryInfo(handle).free >> 20)
print({p.pid: p.usedGpuMemory >> 20 for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)})
try:
    torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
    print("fits")
except torch.OutOfMemoryError:
    print("out of memory")
"""


@pytest.fixture(scope="module")
def gpu():
    # The present session may have a virtual GPU itself; this one is another.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield VirtualGPU(CARD)


@pytest.fixture(scope="module")
def holder(gpu):
    """A process that holds half of the card."""
    environment = os.environ | gpu.isolation().environment
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_HALF], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.stdin.close()


@pytest.fixture
def look(forks, gpu):
    """What another process sees on the card."""

    def look():
        free, processes, outcome = forks.run(LOOKS, **gpu.isolation().environment).splitlines()
        return [int(word) for word in free.split()], eval(processes), outcome

    return look


def test_one_holds_half_and_the_other_sees_it(holder, look):
    free, processes, outcome = look()
    left = 40 * 1024 - 20 * 1024 - 2 * 512
    assert free == [left, left]
    assert processes.pop(holder.pid) == 20 * 1024 + 512
    assert list(processes.values()) == [512]
    assert outcome == "out of memory"


def test_the_device_names_who_holds_what(gpu, holder):
    info = gpu.info()
    assert info.free_bytes == 20 * GIB - 512 * MIB
    [other] = info.others
    assert (other.pid, other.used_bytes) == (holder.pid, 20 * GIB + 512 * MIB)
    assert other.name.startswith(sys.executable)


def test_another_object_can_be_the_same_card(gpu, holder):
    assert VirtualGPU(CARD, shared_with=gpu).info().free_bytes == gpu.info().free_bytes < 20 * GIB
    assert VirtualGPU(CARD).info().free_bytes == 40 * GIB


def test_a_killed_process_gives_its_bytes_back(gpu, holder, look):
    """The last test of the file: the process that holds half was there for all of them."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    free, processes, outcome = look()
    assert free == [40 * 1024 - 512] * 2
    assert list(processes.values()) == [512]
    assert outcome == "fits"
    assert gpu.info().others == ()
