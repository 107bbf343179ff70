"""Accelerators that are not here: stand-ins for ``torch.accelerator`` and a backend's module."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from autobatch.device.accelerator import MPS_DEFAULT_FRACTION, AcceleratorDevice
from autobatch.errors import DeviceNotFoundError
from autobatch.units import GIB

TOTAL = 16 * GIB


class Api:
    """``torch.accelerator`` for one device of ``kind`` that has reserved 3 GiB and uses 2."""

    def __init__(self, kind: str | None = "xpu", *, count: int = 2) -> None:
        self.kind, self.count = kind, count
        self.calls: dict[str, list[Any]] = defaultdict(list)

    def current_accelerator(self, check_available: bool) -> SimpleNamespace | None:
        assert check_available
        return SimpleNamespace(type=self.kind) if self.kind else None

    def current_device_index(self) -> int:
        return self.count - 1

    def device_count(self) -> int:
        return self.count

    def memory_stats(self, index: int) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": 2 * GIB,
            "allocated_bytes.all.peak": 4 * GIB,
            "reserved_bytes.all.current": 3 * GIB,
            "reserved_bytes.all.peak": 5 * GIB,
            "num_alloc_retries": 7,
        }

    def get_memory_info(self, index: int) -> tuple[int, int]:
        return 12 * GIB, TOTAL

    def reset_peak_memory_stats(self, index: int) -> None:
        self.calls["reset"].append(index)

    def synchronize(self, index: int) -> None:
        self.calls["synchronize"].append(index)

    def empty_cache(self) -> None:
        self.calls["empty_cache"].append("api")


class BareApi(Api):
    """The same for a backend that implements none of the memory functions."""

    def memory_stats(self, index: int) -> dict[str, int]:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    def get_memory_info(self, index: int) -> tuple[int, int]:
        raise NotImplementedError

    def reset_peak_memory_stats(self, index: int) -> None:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")


class Xpu:
    def __init__(self, fraction: float = 1.0) -> None:
        self.fraction, self.allowed = fraction, list[int]()

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name="Data Center GPU Max", driver_version="1.3.2")

    def get_per_process_memory_fraction(self, index: int) -> float:
        return self.fraction

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        assert index == 1
        self.fraction = fraction
        self.allowed.append(int(fraction * TOTAL))


class Mps:
    def __init__(self) -> None:
        self.fractions = list[float]()
        self.released = 0

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def current_allocated_memory(self) -> int:
        return 2 * GIB

    def driver_allocated_memory(self) -> int:
        return 3 * GIB

    def recommended_max_memory(self) -> int:
        return TOTAL

    def empty_cache(self) -> None:
        self.released += 1


def test_an_accelerator_with_all_of_torchs_functions() -> None:
    api = Api()
    device = AcceleratorDevice("xpu", api=api, backend=Xpu())
    assert device.torch_device == "xpu:1"  # torch's current one
    info = device.info()
    assert (info.name, info.kind, info.index, info.driver) == ("Data Center GPU Max", "xpu", 1, "1.3.2")
    assert (info.total_bytes, info.free_bytes) == (TOTAL, 12 * GIB)
    assert device.budget_bytes() == 15 * GIB  # 3 reserved, 12 free; the rest is others'
    assert device.held_bytes() == 2 * GIB
    assert device.retries() == 7
    measured = device.measure()
    assert (measured.peak_allocated_bytes, measured.peak_reserved_bytes) == (4 * GIB, 5 * GIB)
    assert measured.device_used_bytes == 4 * GIB
    device.reset_peaks()
    device.synchronize()
    device.release()
    assert api.calls == {"reset": [1], "synchronize": [1], "empty_cache": ["api"]}


@pytest.mark.parametrize("limit_bytes", [1, GIB, 3 * GIB + 1, 10_000_000_019, TOTAL - 1])
def test_the_cap_is_exact_to_the_byte_and_put_back(limit_bytes: int) -> None:
    backend = Xpu()
    with AcceleratorDevice("xpu:1", api=Api(), backend=backend).restrict(limit_bytes) as restricted:
        assert restricted
        assert backend.allowed == [limit_bytes]
    assert backend.fraction == 1.0


def test_the_users_fraction_bounds_budget_and_restriction() -> None:
    backend = Xpu(fraction=0.25)
    device = AcceleratorDevice("xpu:1", api=Api(), backend=backend)
    assert device.budget_bytes() == TOTAL // 4
    with device.restrict(8 * GIB):
        assert backend.allowed[-1] == TOTAL // 4
    with device.restrict(GIB):
        assert backend.allowed[-1] == GIB
    assert backend.fraction == 0.25


def test_what_is_cached_above_a_cap_is_given_back_first() -> None:
    api = Api()
    device = AcceleratorDevice("xpu:1", api=api, backend=Xpu())
    with device.restrict(4 * GIB):
        assert not api.calls["empty_cache"]
    with device.restrict(2 * GIB):
        assert api.calls["empty_cache"] == ["api"]


def test_mps_in_torch_2_14() -> None:
    backend = Mps()
    device = AcceleratorDevice("mps", api=Api("mps", count=1), backend=backend)
    assert device.budget_bytes() == 15 * GIB
    with device.restrict(8 * GIB) as restricted:
        assert restricted
        assert backend.fractions == [0.5]
    assert backend.fractions == [0.5, MPS_DEFAULT_FRACTION]


def test_mps_before_torch_2_14_has_names_of_its_own() -> None:
    backend = Mps()
    device = AcceleratorDevice("mps", api=BareApi("mps", count=1), backend=backend)
    assert device.budget_bytes() == TOTAL
    assert device.held_bytes() == 2 * GIB
    assert device.retries() is None
    device.reset_peaks()
    assert device.measure().peak_allocated_bytes is None
    device.release()
    assert backend.released == 1


def test_mps_has_the_fraction_of_its_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.5")
    backend = Mps()
    device = AcceleratorDevice("mps:0", api=Api("mps", count=1), backend=backend)
    assert device.budget_bytes() == TOTAL // 2
    with device.restrict(GIB):
        pass
    assert backend.fractions == [1 / 16, 0.5]


def test_a_backend_without_fraction_cannot_be_made_smaller() -> None:
    device = AcceleratorDevice("npu:0", api=Api("npu"), backend=SimpleNamespace())
    with device.restrict(GIB) as restricted:
        assert not restricted
    with device.restrict(None) as restricted:
        assert restricted
    assert device.info().name == "npu accelerator"
    assert device.budget_bytes() == 15 * GIB


def test_a_backend_that_answers_nothing_is_unknown_not_zero() -> None:
    device = AcceleratorDevice("npu:0", api=BareApi("npu"), backend=SimpleNamespace())
    assert device.budget_bytes() is device.held_bytes() is device.retries() is None
    measured = device.measure()
    assert measured.peak_allocated_bytes is measured.peak_reserved_bytes is measured.device_used_bytes is None
    assert device.info().total_bytes is None
    limited = AcceleratorDevice("npu:0", memory_limit_bytes=GIB, api=BareApi("npu"), backend=SimpleNamespace())
    assert limited.budget_bytes() == GIB


@pytest.mark.parametrize(
    ("name", "kind", "told"), [("xpu", None, "none"), ("xpu", "mps", "mps"), ("xpu:2", "xpu", "there are 2")]
)
def test_an_accelerator_that_is_not_there(name: str, kind: str | None, told: str) -> None:
    with pytest.raises(DeviceNotFoundError, match=told):
        AcceleratorDevice(name, api=Api(kind), backend=SimpleNamespace())
