"""The environment of a child and the refusals; what attaching does is in ``tests/gpu/test_virtual_attach.py``."""

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from autobatch.errors import AutobatchWarning, DeviceError, DeviceNotFoundError, InvalidArgumentError
from autobatch.virtual import attach, folders, host
from autobatch.virtual.catalog import find_card
from autobatch.virtual.device import VirtualGPU
from autobatch.virtual.resolve import resolve_device


@pytest.fixture
def driver(monkeypatch):
    """A driver that is not built: only its paths matter here."""

    def at(folder):
        monkeypatch.setattr(attach, "driver_folder", lambda: Path(folder))
        monkeypatch.setattr(attach, "preload_libraries", lambda folder: [folder / "liba.so", folder / "libb.so"])

    at("/cache/driver")
    return at


def test_environment_of_a_child(driver):
    variables = attach.environment(Path("/run/state"), base={})
    assert variables == {
        "AUTOBATCH_VIRTUAL_STATE": "/run/state",
        "LD_PRELOAD": "/cache/driver/liba.so:/cache/driver/libb.so",
        "LD_LIBRARY_PATH": "/cache/driver",
        "TRITON_LIBCUDA_PATH": "/cache/driver",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT": "0.5",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def test_what_was_there_stays_behind_ours(driver):
    base = {"LD_PRELOAD": "/usr/lib/libjemalloc.so", "LD_LIBRARY_PATH": "/opt/lib:", "TORCH_CPP_LOG_LEVEL": "INFO"}
    variables = attach.environment(Path("/run/state"), base=base)
    assert variables["LD_PRELOAD"] == "/cache/driver/liba.so:/cache/driver/libb.so:/usr/lib/libjemalloc.so"
    assert variables["LD_LIBRARY_PATH"] == "/cache/driver:/opt/lib:"
    assert variables["TORCH_CPP_LOG_LEVEL"] == "INFO"


@pytest.mark.parametrize(
    ("theirs", "both"),
    [
        ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_settings_of_malloc_are_kept(driver, theirs, both):
    assert attach.environment(Path("/run/state"), base={"GLIBC_TUNABLES": theirs})["GLIBC_TUNABLES"] == both


def test_nesting_changes_nothing_more(driver):
    once = attach.environment(Path("/run/state"), base={"LD_PRELOAD": "/usr/lib/x.so"})
    assert attach.environment(Path("/run/state"), base=once) == once


def test_a_path_that_ld_preload_cannot_hold_is_refused(driver):
    driver("/home/a b/cache")
    with pytest.raises(DeviceError, match="LD_PRELOAD"):
        attach.environment(Path("/run/state"), base={})


def test_the_state_is_private_and_goes_with_its_maker(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with attach.temporary_state([find_card("t4")]) as path:
        assert path.exists()
        assert path.parent.parent == tmp_path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_makers_are_swept_when_they_are_old(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    alive = attach.make_state_folder()
    old, young, other = (tmp_path / f"autobatch-gpu-{name}" for name in ("1-99999-dead", "1-99998-dead", "x-y-z"))
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (alive, old, other):
        os.utime(folder, (0, 0))
    new = attach.make_state_folder()
    assert {alive, young, other, new} == set(tmp_path.iterdir())


def test_what_nobody_else_uses_is_swept_as_soon_as_its_maker_is_known_to_be_gone(tmp_path):
    """As the folder of a command's trial, which may hold a checkpoint."""
    mine = folders.make_folder("trial-", tmp_path, ends_with_maker=True)
    numbering = mine.name.split("-")[3]
    assert numbering
    gone, elsewhere, unknown = (tmp_path / f"trial-1-99999-{name}" for name in (f"{numbering}-a", "9f-b", "c"))
    for folder in (gone, elsewhere, unknown):
        folder.mkdir()
        (folder / "weights").touch()
    new = folders.make_folder("trial-", tmp_path, ends_with_maker=True)
    assert {mine, elsewhere, unknown, new} == set(tmp_path.iterdir())
    (tmp_path / f"trial-1-99999-{numbering}-d").mkdir()
    last = folders.make_folder("trial-", tmp_path)  # of what others may use the young ones stay
    assert len(set(tmp_path.iterdir()) - {mine, elsewhere, unknown, new, last}) == 1


def test_too_late_once_torch_is_imported(monkeypatch):
    monkeypatch.setattr(attach, "present_state", lambda: None)
    gpu = VirtualGPU("t4")
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(DeviceError, match=r"torch is imported already.*autobatch run"):
        gpu.attach()


def test_too_late_once_a_real_driver_is_loaded(monkeypatch):
    monkeypatch.setattr(attach, "present_state", lambda: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(attach, "_mapped_files", lambda: "7f00 r-xp 0 08:01 12 /usr/lib/libcuda.so.1\n")
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1 is loaded"):
        VirtualGPU("t4").attach()


def test_a_second_virtual_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(attach, "present_state", lambda: Path("/run/state"))
    with pytest.raises(DeviceError, match="already"):
        VirtualGPU("t4").attach()


def test_a_driver_behind_a_link_is_recognized(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("AUTOBATCH_VIRTUAL_STATE", "/run/state")
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path / "link"))
    monkeypatch.setattr(attach, "_attached", None)
    mapped = f"7f00 r-xp 0 08:01 12    {tmp_path.resolve()}/real/libnvidia-ml.so.1\n"
    monkeypatch.setattr(attach, "_mapped_files", lambda: mapped)
    assert attach.present_state() == Path("/run/state")
    monkeypatch.setattr(attach, "_mapped_files", lambda: mapped.replace("/real/", "/other/"))
    assert attach.present_state() is None


def test_other_platforms_are_told_where_it_works(monkeypatch):
    monkeypatch.setattr(host.sys, "platform", "darwin")
    with pytest.raises(DeviceNotFoundError, match="container"):
        VirtualGPU("t4")


@pytest.fixture
def install_torch(monkeypatch, tmp_path):
    """Puts a torch first on the path, of which only the record of its build exists."""

    def install(version, cuda):
        package = tmp_path / "torch"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip = None\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.delitem(sys.modules, "torch", raising=False)

    return install


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        ("2.14.1+cpu", None, r"2\.14\.1\+cpu is built without CUDA.*pip install"),
        ("2.11.0+cu128", "12.8", r"2\.11\.0\+cu128 is built for CUDA 12\.8.*pip install"),
    ],
)
def test_another_build_of_torch_says_what_to_install(install_torch, version, cuda, said):
    install_torch(version, cuda)
    with pytest.raises(DeviceNotFoundError, match=said):
        VirtualGPU("t4")


def test_a_torch_that_no_test_ran_on_is_named(monkeypatch):
    build = host.check_host()
    monkeypatch.setattr(host, "check_host", lambda: dataclasses.replace(build, version="2.15.0+cu130"))
    with pytest.warns(AutobatchWarning, match=r"up to 2\.14, and this is 2\.15\.0\+cu130"):
        VirtualGPU("t4")
    monkeypatch.setattr(host, "check_host", lambda: build)
    assert host.untested_torch() is None


def test_no_torch_at_all_says_so(monkeypatch):
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceNotFoundError, match="need torch"):
        VirtualGPU("t4")


def test_the_build_of_the_installed_torch():
    import torch

    found = host.check_host()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert any((path / "cuda.h").exists() for path in found.includes)


def test_a_card_without_kernels_is_refused_with_the_reason():
    with pytest.raises(DeviceNotFoundError, match=r"7\.0.*no kernels below 7\.5.*any_capability"):
        VirtualGPU("v100-16gb")
    with pytest.raises(DeviceNotFoundError, match=r"no kernels"):
        VirtualGPU("memory=8GiB,capability=6.1")
    with pytest.raises(DeviceNotFoundError, match=r"99\.9.*no kernels from 13\.0 on"):
        VirtualGPU("memory=24GiB,capability=99.9")
    assert VirtualGPU("v100-16gb", any_capability=True).card.capability == (7, 0)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2", 65])
def test_a_wrong_count_is_refused(count):
    with pytest.raises(InvalidArgumentError, match="count"):
        VirtualGPU("t4", count=count)


def test_shared_cards_must_be_the_same():
    with pytest.raises(InvalidArgumentError, match="shared_with"):
        VirtualGPU("t4", shared_with=VirtualGPU("l4"))
    first = VirtualGPU("l4")
    assert VirtualGPU("L4", shared_with=first).state_path == first.state_path


def test_the_state_file_goes_with_its_virtual_gpu():
    gpu = VirtualGPU("l4")
    folder = gpu.state_path.parent
    assert folder.exists()
    del gpu
    assert not folder.exists()


def test_a_forked_child_does_not_take_the_state_away():
    gpu = VirtualGPU("l4")
    folder = gpu.state_path.parent
    code = (
        "import os, sys; from autobatch.virtual.device import VirtualGPU; gpu = VirtualGPU('l4'); "
        "print(gpu.state_path, flush=True)\n"
        "if os.fork() == 0: sys.exit(0)\n"
        "os.wait(); print(gpu.state_path.exists())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path, still_there = done.stdout.split()
    assert still_there == "True"
    assert not os.path.exists(path)
    assert folder.exists()


def test_who_it_is_before_anything_ran():
    info = VirtualGPU("a100-40gb").info()
    assert (info.name, info.kind, info.virtual, info.capability) == ("NVIDIA A100-SXM4-40GB", "cuda", True, "8.0")
    assert info.free_bytes == info.total_bytes == find_card("a100-40gb").total_bytes
    assert info.others == ()


def test_the_measuring_half_needs_the_card_in_this_process():
    gpu = VirtualGPU("t4")
    for ask in (
        gpu.budget_bytes,
        gpu.begin,
        gpu.held_bytes,
        gpu.synchronize,
        gpu.release,
        gpu.reset_peaks,
        gpu.retries,
        gpu.measure,
    ):
        with pytest.raises(DeviceError, match="not in this process"):
            ask()
    with pytest.raises(DeviceError, match="not in this process"):
        gpu.restrict(None)


def test_trials_need_a_child_with_the_drivers_environment(driver):
    isolation = VirtualGPU("t4", memory_limit_bytes=123).isolation()
    assert isolation.required
    assert isolation.device == "cuda:0"
    assert isolation.memory_limit_bytes == 123
    assert isolation.environment["LD_PRELOAD"].startswith("/cache/driver/liba.so:/cache/driver/libb.so")
    assert Path(isolation.environment["AUTOBATCH_VIRTUAL_STATE"]).parent.name.startswith("autobatch-gpu-")


def test_neither_attach_nor_the_device_imports_torch():
    code = "import sys, autobatch.virtual.device, autobatch.virtual.launch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_of_a_virtual_gpu_there_are_several():
    assert resolve_device("t4", count=2).count == 2
    for spec in ("cpu", "auto", VirtualGPU("t4")):
        with pytest.raises(InvalidArgumentError, match="count"):
            resolve_device(spec, count=2)
