"""Host memory: what is peculiar to it. What it shares with every device is in tests/conformance."""

from __future__ import annotations

import io
import mmap
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from autobatch.device import process
from autobatch.device.host import CHILD_ENVIRONMENT, SHARE_OF_AVAILABLE, HostDevice
from autobatch.device.oom import is_oom
from autobatch.errors import DeviceError
from autobatch.units import GIB, MIB


def ones(size_bytes: int) -> torch.Tensor:
    return torch.ones(size_bytes, dtype=torch.uint8)


def test_a_model_that_exists_already_counts_against_the_limit() -> None:
    model = ones(600 * MIB)
    with HostDevice(memory_limit_bytes=GIB).restrict(None):
        ones(350 * MIB)
        with pytest.raises(RuntimeError) as caught:
            ones(500 * MIB)
    assert is_oom(caught.value)
    del model


HOLES = """
import torch
from autobatch.device import process
from autobatch.device.host import HostDevice
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.probe.workload import Workload

MIB = 1 << 20

def take(pieces, size_bytes):
    return [torch.ones(size_bytes, dtype=torch.uint8) for _ in range(pieces)]

def outcome_of(pieces, size_bytes):
    workload = Workload.from_step(lambda n: take(pieces, size_bytes))
    trial = run_trial(workload, device, TrialRequest(batch_size=1, steps=2, limit_bytes=256 * MIB)).trial
    return trial.outcome.name

device = HostDevice()
with device.restrict(256 * MIB) as restricted:
    assert restricted, "nothing was in this heap"
pieces = take(6400, 16 * 1024)  # 100 MiB below malloc's mapping threshold
kept = pieces[::64]
del pieces  # the heap cannot shrink below what is kept
assert process.free_heap_bytes() > 64 * MIB
seen = [outcome_of(1, 240 * MIB), outcome_of(1, 270 * MIB), outcome_of(14000, 16 * 1024), outcome_of(19000, 16 * 1024)]
assert seen == ["FITS", "OOM", "FITS", "OVER_HEADROOM"], seen
"""


def test_a_heap_with_holes_is_no_burden_to_large_tensors_and_no_gift_to_small_ones() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mapped_file_is_no_private_data_and_an_array_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.touch()
    os.truncate(path, 64 * MIB)
    before = process.tensor_bytes()
    read = torch.from_numpy(np.memmap(path, dtype=np.int8, mode="c"))  # private, to be written to
    assert process.tensor_bytes() == before + 64 * MIB
    del read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
        read = torch.from_numpy(np.memmap(path, dtype=np.int8, mode="r"))
    shared = torch.from_numpy(np.memmap(path, dtype=np.int8, mode="r+"))
    assert process.tensor_bytes() == before
    array = np.ones(8 * MIB, dtype=np.int8)
    twice = [torch.from_numpy(array), torch.from_numpy(array[MIB:]), torch.from_numpy(array[:MIB])]
    assert process.tensor_bytes() == before + 8 * MIB
    del read, shared, twice


def test_only_the_soft_limit_is_touched() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with HostDevice().restrict(GIB):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        assert soft < before[0] or before[0] == resource.RLIM_INFINITY
        assert hard == before[1]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


RESERVED = """
import torch
from autobatch.device.host import HostDevice

MIB = 1 << 20
device = HostDevice()
held = torch.ones(100 * MIB, dtype=torch.uint8)
seen = []
for size in (400, 200, 600):
    device.reset_peaks()
    with device.restrict(1024 * MIB):
        torch.empty(size * MIB, dtype=torch.uint8)
    seen.append(device.measure().peak_reserved_bytes)
assert [None if b is None else round(b / MIB / 10) * 10 for b in seen] == [500, None, 700], seen
"""


def test_reserved_is_private_data_touched_or_not_known_where_it_is_higher_than_ever() -> None:
    done = subprocess.run([sys.executable, "-c", RESERVED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_that_is_never_touched_counts_for_the_limit_but_is_not_allocated() -> None:
    device = HostDevice()
    device.reset_peaks()
    with device.restrict(GIB):
        torch.empty(900 * MIB, dtype=torch.uint8)
        with pytest.raises(RuntimeError):
            torch.empty(GIB + MIB, dtype=torch.uint8)
    peak_bytes = device.measure().peak_allocated_bytes
    assert peak_bytes is None or peak_bytes < 100 * MIB


def test_without_a_mark_that_can_be_reset_only_higher_peaks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> int:
        raise PermissionError(path)

    Path("/proc/self/clear_refs").write_text("5")
    monkeypatch.setattr(Path, "write_text", refuse)
    device = HostDevice()
    ones(300 * MIB)
    device.reset_peaks()
    ones(100 * MIB)
    assert device.measure().peak_allocated_bytes is None
    ones(500 * MIB)
    assert device.measure().peak_allocated_bytes == pytest.approx(500 * MIB, rel=0.1)


def test_the_default_budget_is_a_share_of_what_is_available_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "container_available_bytes", lambda: 3 * GIB)
    device = HostDevice()
    expected_bytes = SHARE_OF_AVAILABLE * 3 * GIB + process.tensor_bytes()
    assert device.budget_bytes() == pytest.approx(expected_bytes, abs=MIB)
    assert device.info().details["budget"] == "2.40 GiB, 80% of what is available"
    assert device.isolation().memory_limit_bytes == device.budget_bytes()


def test_a_given_limit_is_named_too() -> None:
    assert HostDevice(memory_limit_bytes=2 * GIB).info().details["budget"] == "2.00 GiB, the limit given"


@pytest.mark.parametrize("missing", ["platform", "resource", "proc"])
def test_without_such_a_limit_an_error_says_what_is_possible(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif missing == "resource":
        monkeypatch.setitem(sys.modules, "resource", None)
    else:
        monkeypatch.setattr(process, "status_bytes", dict)
    device = HostDevice()
    with pytest.raises(DeviceError, match="Possible here: a GPU or another accelerator"), device.restrict(GIB):
        pass
    assert device.info().total_bytes
    with device.restrict(None):
        pass


def test_a_limit_that_the_system_does_not_keep_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(mmap, "mmap", lambda *args, **kwargs: io.BytesIO())
    with pytest.raises(DeviceError, match="does not keep it"), HostDevice().restrict(GIB):
        pass
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_tensors_are_counted_once_and_only_where_they_are() -> None:
    before = process.tensor_bytes()
    base = ones(10 * MIB)
    views = [base[:5], base.view(2, -1), torch.nn.Parameter(base.float())]
    meta = torch.empty(GIB, device="meta")
    assert process.tensor_bytes() == before + 10 * MIB + 40 * MIB
    del base, views, meta
    assert process.tensor_bytes() == before


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_containers_limit_is_what_is_available(tmp_path: Path) -> None:
    write_group(tmp_path, memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"anon 1\ninactive_file {GIB}")
    assert process.container_available_bytes(tmp_path) == 2 * GIB


def test_a_containers_limit_in_the_older_form(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    write_group(
        folder, memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=GIB, memory__stat="total_inactive_file 0"
    )
    assert process.container_available_bytes(tmp_path) == 3 * GIB


@pytest.mark.parametrize("limit", ["max", None])
def test_no_containers_limit(tmp_path: Path, limit: str | None) -> None:
    if limit is not None:
        write_group(tmp_path, memory__max=limit, memory__current=GIB, memory__stat="inactive_file 0")
    assert process.container_available_bytes(tmp_path) is None


def test_its_settings_reach_the_c_library_of_a_child() -> None:
    code = (
        "import ctypes, sys\n"
        "class Info(ctypes.Structure):\n"
        "    _fields_ = [(n, ctypes.c_size_t) for n in 'arena ordblks smblks hblks hblkhd'.split()]\n"
        "    _fields_ += [(n, ctypes.c_size_t) for n in 'usmblks fsmblks uordblks fordblks keepcost'.split()]\n"
        "libc = ctypes.CDLL(None); libc.mallinfo2.restype = Info; libc.malloc.restype = ctypes.c_void_p\n"
        "libc.free.argtypes = [ctypes.c_void_p]; libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "libc.free(libc.malloc(8 << 20))\n"  # by default the threshold has now grown to 8 MiB
        "before = libc.mallinfo2().hblkhd; libc.malloc(4 << 20)\n"
        "sys.exit(libc.mallinfo2().hblkhd - before < 4 << 20)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=CHILD_ENVIRONMENT, check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], env={}, check=False).returncode == 1


def test_its_description_needs_no_torch() -> None:
    code = (
        "import sys; from autobatch.device.host import HostDevice; HostDevice().info(); HostDevice().budget_bytes(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
