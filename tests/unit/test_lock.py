"""One probe at a time on one device, whatever becomes of the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from autobatch import VirtualGPU, find
from autobatch.errors import AutobatchWarning
from autobatch.probe import lock as lock_module
from autobatch.probe.lock import HELD_VARIABLE, child_environment, device_lock, lock_path
from autobatch.testing import FakeDevice
from autobatch.units import GIB

HOLDER = """
import sys, time
from autobatch.probe.lock import device_lock
from autobatch.testing import FakeDevice
device = FakeDevice(1, lambda n: 0)
device.torch_device = "xpu:0"
with device_lock(device):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A device that has a lock, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lock_module, "_SILENT_S", 0.2)
    device = FakeDevice(16 * GIB, lambda n: n * GIB)
    device.torch_device = "xpu:0"
    return device


@contextlib.contextmanager
def hold(seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock; it ends with the block, however that is left."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(seconds)], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def is_silent(device: FakeDevice) -> bool:
    """Whether the lock can be had at once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with device_lock(device):
            pass
    return not caught


def test_a_second_probe_waits_and_says_so(gpu):
    with hold(3) as holder:
        started_s = time.monotonic()
        with pytest.warns(AutobatchWarning, match="another probe is at work on xpu:0: waiting"), device_lock(gpu):
            assert time.monotonic() - started_s > 0.2
        assert holder.wait() == 0
    assert is_silent(gpu)


def test_a_killed_probe_holds_nothing(gpu):
    with hold(1000) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert is_silent(gpu)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_holds_nothing(gpu):
    with hold(1000):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.warns(AutobatchWarning), pytest.raises(KeyboardInterrupt), device_lock(gpu):
            pass
    assert is_silent(gpu)
    assert child_environment() == {}


def test_an_error_inside_gives_it_back(gpu):
    with pytest.raises(KeyError), device_lock(gpu):
        raise KeyError
    assert is_silent(gpu)


def test_a_search_within_a_search_passes(gpu):
    with device_lock(gpu):
        assert is_silent(gpu)
        assert is_silent(gpu)
    assert is_silent(gpu)


def test_a_child_passes_under_the_lock_of_its_parent(gpu, monkeypatch):
    with device_lock(gpu):
        told = child_environment()
    assert told == {HELD_VARIABLE: str(lock_path(gpu))}
    with hold(1000):
        monkeypatch.setenv(HELD_VARIABLE, told[HELD_VARIABLE])
        assert is_silent(gpu)
        assert child_environment() == told


def test_another_thread_waits(gpu):
    order = []

    def second() -> None:
        with device_lock(gpu):
            order.append("second")

    with device_lock(gpu):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_folder_that_cannot_be_written_is_a_warning(gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    entered = False
    with pytest.warns(AutobatchWarning, match="xpu:0 is not locked against other probes"), device_lock(gpu):
        entered = True
    assert entered


def test_host_memory_needs_none():
    assert lock_path(FakeDevice(1, lambda n: 0)) is None


def test_a_virtual_gpu_is_locked_for_those_who_share_it():
    one = VirtualGPU("a100-40gb")
    shared, other = VirtualGPU("a100-40gb", shared_with=one), VirtualGPU("a100-40gb")
    assert lock_path(one) == lock_path(shared) != lock_path(other)
    assert lock_path(one).parent == one.state_path.parent  # removed with it


def test_a_gpu_is_known_by_its_uuid_whatever_its_number(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = FakeDevice(1, lambda n: 0)
    device.torch_device = "cuda:1"
    found = [lock_module.nvml.DeviceInfo(name="GPU", kind="cuda", index=1, uuid="GPU-1b2c/..")]
    monkeypatch.setattr(lock_module.nvml, "list_gpus", lambda: found)
    monkeypatch.setattr(lock_module, "present_state", lambda: None)
    assert lock_path(device).name == "1b2c_...lock"
    assert lock_path(device).is_relative_to(tmp_path)


def test_find_holds_it_while_it_searches(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "lock_path", lambda device: tmp_path / "lock")
    gpu.torch_device, seen = "cpu", []
    result = find(gpu.step, device=gpu, on_trial=lambda trial: seen.append(bool(child_environment())))
    assert result.batch_size > 0
    assert set(seen) == {True}
    assert child_environment() == {}
