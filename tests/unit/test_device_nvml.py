"""What is made of the driver's answers, and of its silence. The driver is a stand-in with pynvml's names."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from autobatch.device.nvml import find_gpu, list_gpus, visible_uuids
from autobatch.units import GIB

A, B, C = "GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"


class NVMLError(Exception):
    pass


class Driver:
    """A driver with these GPUs (None: one that was lost). ``refused`` names the calls it does not support or permit."""

    NVMLError = NVMLError

    def __init__(self, *gpus: SimpleNamespace | None, refused: tuple[str, ...] = ()) -> None:
        self.gpus, self.refused, self.sessions, self.asked = gpus, refused, 0, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            if name in self.refused:
                raise NVMLError(name)
            if name not in ("nvmlInit", "nvmlShutdown"):
                self.asked += 1
                assert self.sessions > 0, f"{name} outside of a session"
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        if self.gpus[index] is None:
            raise NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> SimpleNamespace:
        for gpu in self.gpus:
            for place in (gpu, *gpu.slices):
                if place.uuid == uuid:
                    return place
        raise NVMLError("not found")

    def nvmlDeviceGetName(self, gpu: SimpleNamespace) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: SimpleNamespace) -> str:
        return gpu.uuid

    def nvmlDeviceGetMemoryInfo(self, gpu: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(total=gpu.total, free=gpu.free, used=gpu.total - gpu.free)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: SimpleNamespace) -> tuple[int, int]:
        return 8, 0

    def nvmlDeviceGetPowerManagementLimit(self, gpu: SimpleNamespace) -> int:
        return 400_000

    def nvmlDeviceGetComputeMode(self, gpu: SimpleNamespace) -> int:
        return 0

    def nvmlDeviceGetMigMode(self, gpu: SimpleNamespace) -> list[int]:
        return [int(bool(gpu.slices)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: SimpleNamespace) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: SimpleNamespace, index: int) -> SimpleNamespace:
        if index >= len(gpu.slices):
            raise NVMLError("not found")
        return gpu.slices[index]

    def nvmlDeviceGetComputeRunningProcesses_v3(self, gpu: SimpleNamespace) -> list[SimpleNamespace]:
        return gpu.processes

    def nvmlDeviceGetComputeRunningProcesses_v2(self, gpu: SimpleNamespace) -> list[SimpleNamespace]:
        return gpu.processes

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, gpu: SimpleNamespace) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, gpu: SimpleNamespace) -> list[SimpleNamespace]:
        return []

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        return "/usr/bin/somewhere-else"


CALLS = [name for name in vars(Driver) if name.startswith("nvml")]


def gpu(uuid: str, name: str = "NVIDIA A100", *, processes: tuple = (), slices: tuple = ()) -> SimpleNamespace:
    return SimpleNamespace(
        uuid=uuid, name=name, total=40 * GIB, free=30 * GIB, processes=list(processes), slices=list(slices)
    )


def process(pid: int, used_bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used_bytes)


def test_a_gpu_with_all_its_figures() -> None:
    driver = Driver(gpu(A))
    (row,) = list_gpus(nvml=driver, environ={})
    assert (row.name, row.kind, row.index, row.uuid) == ("NVIDIA A100", "cuda", 0, A)
    assert (row.total_bytes, row.free_bytes) == (40 * GIB, 30 * GIB)
    assert (row.capability, row.driver) == ("8.0", "580.95")
    assert row.details["power_limit_w"] == 400
    assert driver.sessions == 0


def test_other_processes_are_named_and_the_present_one_is_left_out() -> None:
    parent, gone = os.getppid(), 2**22 + 1
    driver = Driver(gpu(A, processes=(process(os.getpid(), GIB), process(parent, None), process(gone, 2 * GIB))))
    others = {other.pid: other for other in list_gpus(nvml=driver, environ={})[0].others}
    assert set(others) == {parent, gone}
    assert others[parent].name
    assert others[parent].used_bytes is None
    assert (others[gone].name, others[gone].used_bytes) == ("/usr/bin/somewhere-else", 2 * GIB)


def test_an_older_driver_is_asked_in_its_own_version() -> None:
    driver = Driver(gpu(A, processes=(process(1, GIB),)), refused=("nvmlDeviceGetComputeRunningProcesses_v3",))
    (row,) = list_gpus(nvml=driver, environ={})
    assert [other.pid for other in row.others] == [1]
    assert "others_unknown" not in row.details


def test_processes_that_the_driver_does_not_tell_are_unknown() -> None:
    refused = tuple(name for name in CALLS if "RunningProcesses" in name)
    (row,) = list_gpus(nvml=Driver(gpu(A), refused=refused), environ={})
    assert row.others == ()
    assert row.details["others_unknown"] is True


@pytest.mark.parametrize("listed", [(), (process(1, GIB),)], ids=["none", "by other numbers"])
def test_a_driver_that_does_not_list_a_process_with_memory_tells_of_no_other(listed: tuple) -> None:
    """As in a container: the present process may be among those that are listed, under another number."""
    driver = Driver(gpu(A, processes=listed))
    hidden = find_gpu(A, nvml=driver, holds_memory=True)
    assert hidden is not None
    assert (hidden.others, hidden.details["others_unknown"]) == ((), True)
    seen = find_gpu(A, nvml=Driver(gpu(A, processes=(process(os.getpid(), GIB), *listed))), holds_memory=True)
    assert seen is not None
    assert [other.pid for other in seen.others] == [other.pid for other in listed]
    assert "others_unknown" not in seen.details


@pytest.mark.parametrize("call", CALLS)
def test_no_refusal_is_an_error(call: str) -> None:
    driver = Driver(gpu(A, processes=(process(1, GIB),), slices=(gpu("MIG-1"),)), refused=(call,))
    for row in list_gpus(nvml=driver, environ={}):
        assert row.name
    find_gpu(A, nvml=driver)


def test_what_is_refused_is_none_and_not_zero() -> None:
    (row,) = list_gpus(nvml=Driver(gpu(A), refused=("nvmlDeviceGetMemoryInfo",)), environ={})
    assert row.total_bytes is None
    assert row.free_bytes is None


def test_without_a_driver_there_are_no_gpus() -> None:
    driver = Driver(gpu(A), refused=("nvmlInit",))
    assert list_gpus(nvml=driver, environ={}) == []
    assert find_gpu(A, nvml=driver) is None
    assert driver.asked == 0


def test_a_module_that_lacks_a_function_is_no_error() -> None:
    bare = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None)
    assert list_gpus(nvml=bare, environ={}) == []


def test_slices_follow_their_gpu_and_have_figures_of_their_own() -> None:
    slices = (gpu("MIG-1", "NVIDIA A100 MIG 1g.5gb"), gpu("MIG-2", "NVIDIA A100 MIG 2g.10gb"))
    rows = list_gpus(nvml=Driver(gpu(A, slices=slices), gpu(B)), environ={"CUDA_VISIBLE_DEVICES": "MIG-2"})
    assert [(row.uuid, row.index) for row in rows] == [(A, None), ("MIG-1", None), ("MIG-2", 0), (B, None)]


def test_slices_follow_their_gpu_also_behind_one_that_is_lost() -> None:
    rows = list_gpus(nvml=Driver(None, gpu(A), gpu(B, slices=(gpu("MIG-1"),)), gpu(C)), environ={})
    assert [row.uuid for row in rows] == [A, B, "MIG-1", C]


def test_slices_follow_their_gpu_also_where_no_gpu_tells_its_uuid() -> None:
    gpus = (gpu("", "first", slices=(gpu("", "slice of first"),)), gpu("", "second"))
    rows = list_gpus(nvml=Driver(*gpus, refused=("nvmlDeviceGetUUID",)), environ={})
    assert [row.name for row in rows] == ["first", "slice of first", "second"]


@pytest.mark.parametrize("given", [A, A.removeprefix("GPU-")])
def test_torchs_uuid_finds_its_gpu(given: str) -> None:
    found = find_gpu(given, nvml=Driver(gpu(B), gpu(A)))
    assert found is not None
    assert found.uuid == A


def test_torchs_uuid_finds_a_slice() -> None:
    found = find_gpu("1", nvml=Driver(gpu(A, slices=(gpu("MIG-1", "a slice"),))))
    assert found is not None
    assert found.name == "a slice"


def test_numbers_follow_the_bus_only_where_that_is_cudas_order() -> None:
    same, mixed = Driver(gpu(A), gpu(B)), Driver(gpu(A), gpu(B, "NVIDIA T400"))

    def indices(driver: Driver, **environ: str) -> list[int | None]:
        return [row.index for row in list_gpus(nvml=driver, environ=environ)]

    assert indices(same) == [0, 1]
    assert indices(same, CUDA_VISIBLE_DEVICES="1,0") == [1, 0]
    assert indices(same, CUDA_VISIBLE_DEVICES="1") == [None, 0]
    assert indices(mixed) == [None, None]
    assert indices(mixed, CUDA_DEVICE_ORDER="PCI_BUS_ID") == [0, 1]
    assert indices(mixed, CUDA_VISIBLE_DEVICES=B) == [None, 0]


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2", [B, C]),
        ("0,9,1", [A]),  # an entry that names nothing ends the list
        ("0,-1,1", [A]),
        ("0,0", []),  # one that names a device again empties it
        ("1x,2", [B, C]),  # read as far as there are digits
        (A, [A]),
        (f"{C},{A}", [C, A]),
        ("GPU-c", [C]),
        ("GPU-aa", []),  # two begin so
        ("GPU-aaaa,GPU-ffff,GPU-c", [A]),
        ("GPU-aaaa,GPU-aaaa-1", []),
        (f"{A},1", [A]),  # another kind of entry ends the list
        (f"0,{B}", [A]),
        ("MIG-7", ["MIG-7"]),
        ("MIG-7,MIG-8", ["MIG-7", "MIG-8"]),
        (f"MIG-7,{A}", ["MIG-7"]),
    ],
)
def test_cuda_visible_devices(variable: str | None, visible: list[str]) -> None:
    assert visible_uuids(variable, [A, "MIG-7", "MIG-8", B, C], numbered=[A, B, C]) == visible


def test_numbers_mean_nothing_where_cudas_order_is_unknown() -> None:
    assert visible_uuids("0", [A, B], numbered=None) is None
    assert visible_uuids(None, [A, B], numbered=None) is None
    assert visible_uuids("-1", [A, B], numbered=None) == []
    assert visible_uuids(A, [A, B], numbered=None) == [A]


def test_needs_no_torch() -> None:
    code = "import sys; from autobatch.device.nvml import list_gpus; list_gpus(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
