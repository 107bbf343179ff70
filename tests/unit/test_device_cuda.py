"""CUDA: what is peculiar to it. What it shares with every device is in tests/conformance."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from autobatch.device.cuda import CudaDevice
from autobatch.device.fraction import fraction_of
from autobatch.errors import DeviceNotFoundError
from autobatch.units import GIB, MIB


def test_a_fraction_gives_its_bytes_back() -> None:
    numbers = random.Random(0)
    for _ in range(20_000):
        total_bytes = numbers.randrange(1, 200 * GIB)
        limit_bytes = numbers.randrange(0, total_bytes + 1)
        fraction = fraction_of(limit_bytes, total_bytes)
        assert 0 <= fraction <= 1
        assert int(fraction * total_bytes) == limit_bytes
    assert fraction_of(2 * GIB, GIB) == 1


def test_without_a_gpu_it_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceNotFoundError, match="sees no CUDA"):
        CudaDevice("cuda:0")


@pytest.mark.gpu
def test_an_index_that_is_not_there() -> None:
    with pytest.raises(DeviceNotFoundError, match="counted from cuda:0"):
        CudaDevice("cuda:64")


@pytest.mark.gpu
def test_the_gpu_as_torch_and_its_driver_see_it() -> None:
    info = CudaDevice("cuda").info()
    properties = torch.cuda.get_device_properties(0)
    assert info.name == properties.name
    assert info.index == 0
    assert str(properties.uuid) in str(info.uuid)
    assert info.capability == f"{properties.major}.{properties.minor}"
    assert info.total_bytes == torch.cuda.mem_get_info(0)[1]
    assert info.driver or torch.version.hip
    assert info.virtual == ("AUTOBATCH_VIRTUAL_STATE" in os.environ)


@pytest.mark.gpu
def test_a_state_that_no_driver_has_mapped_makes_no_gpu_virtual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOBATCH_VIRTUAL_STATE", str(tmp_path / "state"))
    assert not CudaDevice("cuda").info().virtual


@pytest.mark.gpu
def test_every_bit_of_the_users_fraction_comes_back() -> None:
    device = CudaDevice("cuda:0")
    for fraction in (0.3, 1 / 3, 0.9, 0.123456789, 1.0):
        torch.cuda.set_per_process_memory_fraction(fraction, 0)
        before = torch.cuda.get_per_process_memory_fraction(0)
        for _ in range(5):
            with device.restrict(GIB):
                pass
        assert torch.cuda.get_per_process_memory_fraction(0) == before


@pytest.mark.gpu
def test_the_cap_is_on_reserved_bytes() -> None:
    device = CudaDevice("cuda:0")
    gc.collect()
    device.release()
    held_bytes = torch.cuda.memory_reserved(0)
    with device.restrict(held_bytes + 64 * MIB):
        fits = torch.empty(62 * MIB, dtype=torch.uint8, device="cuda:0")
        del fits
        device.release()
        exact = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:0")
        # Larger than any hole that other tests may have left in what is held.
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(held_bytes + 2 * MIB, dtype=torch.uint8, device="cuda:0")
    assert torch.cuda.memory_reserved(0) == held_bytes + 64 * MIB
    del exact


@pytest.mark.gpu
def test_a_freed_cache_and_a_second_try_are_counted_as_retries() -> None:
    device = CudaDevice("cuda:0")
    device.release()
    before = device.retries()
    with device.restrict(torch.cuda.memory_reserved(0) + 512 * MIB):
        cached = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda:0")
        del cached
        torch.empty(400 * MIB, dtype=torch.uint8, device="cuda:0")
    assert device.retries() == before + 1


@pytest.mark.gpu
def test_the_budget_is_what_is_free_and_not_the_cards_total() -> None:
    device = CudaDevice("cuda:0")
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    assert device.budget_bytes() == free_bytes + torch.cuda.memory_reserved(0)
    assert device.budget_bytes() <= total_bytes
    assert device.measure().device_used_bytes == total_bytes - free_bytes
