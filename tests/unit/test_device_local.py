"""Devices by name."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from autobatch.device.host import HostDevice
from autobatch.device.local import local_names, resolve_local
from autobatch.errors import DeviceNotFoundError, InvalidArgumentError
from autobatch.units import GIB


def have(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, accelerator: str | None = None, count: int = 1) -> None:
    """Makes torch see these."""
    current = SimpleNamespace(type=accelerator) if accelerator else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_names_in_the_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, gpus=2, accelerator="cuda", count=2)
    assert local_names() == ["cuda:0", "cuda:1", "cpu"]
    have(monkeypatch, gpus=1, accelerator="npu", count=2)
    assert local_names() == ["cuda:0", "npu:0", "npu:1", "cpu"]
    have(monkeypatch, accelerator="mps")
    assert local_names() == ["mps:0", "cpu"]
    have(monkeypatch)
    assert local_names() == ["cpu"]


@pytest.mark.parametrize("name", ["cpu", "CPU", " cpu ", "cpu:0", "auto"])
def test_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch)
    device = resolve_local(name, memory_limit_bytes=GIB)
    assert isinstance(device, HostDevice)
    assert device.budget_bytes() == GIB


def test_naming_the_host_asks_no_gpu() -> None:
    code = (
        "import sys; from autobatch.device.local import resolve_local; resolve_local('cpu'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0", "CUDA:0"])
def test_the_gpu(name: str) -> None:
    device = resolve_local(name, memory_limit_bytes=GIB)
    assert device.torch_device == "cuda:0"
    assert device.info().kind in ("cuda", "rocm")
    assert device.budget_bytes() == GIB


@pytest.mark.parametrize("name", ["cuda:7", "xpu", "tpu:0", "cpu:1", "a100-40gb"[:4]])
def test_a_device_that_is_not_here_lists_those_that_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, gpus=2, accelerator="cuda", count=2)
    with pytest.raises(DeviceNotFoundError, match="cuda:0, cuda:1, cpu"):
        resolve_local(name)


@pytest.mark.parametrize("name", ["", "cuda:", "cuda:x", "cuda:-1", "cuda 0", "a100-40gb", 0, None, b"cpu"])
def test_what_is_no_name_of_a_device(name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a device was touched"))
    with pytest.raises(InvalidArgumentError) as caught:
        resolve_local(name)
    assert caught.value.argument == "device"
