"""What ``attach`` does to a process and its children. Each test has a process of its own, without a GPU before.

Where it is enough that a GPU was attached and torch imported, that process is a fork of one that has done both.
"""

import os
import subprocess
import sys
import textwrap

import pytest
from platformdirs import user_cache_path

from autobatch.units import GIB, MIB
from autobatch.virtual.catalog import find_card
from tests.gpu.machines import Forks

pytestmark = pytest.mark.gpu

_OURS = ("AUTOBATCH_VIRTUAL_STATE", "LD_PRELOAD", "LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "CUDA_VISIBLE_DEVICES")
CARD = "memory=8GiB,capability=8.6,outside=256MiB,name=mine"


def clean_environment(**variables):
    return {name: value for name, value in os.environ.items() if name not in _OURS} | variables


def run(code, tmp_path, **variables):
    """What ``code`` prints, run as a file in a process that has no virtual GPU yet."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(code))
    environment = clean_environment(**variables)
    command = [sys.executable, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """What code prints where three cards are attached as ``gpu`` and torch is imported."""
    beginning = f"""
from autobatch.virtual.device import VirtualGPU
gpu = VirtualGPU({CARD!r}, count=3, memory_limit_bytes=4 << 30).attach()
import torch
"""
    forks = Forks(tmp_path_factory.mktemp("attached"), clean_environment(), beginning)
    yield lambda code, **variables: forks.run(textwrap.dedent(code), **variables)
    forks.close()


@pytest.fixture(scope="module")
def a_program(tmp_path_factory):
    """What a program prints that attaches a card of the catalog, and what it leaves where states are kept."""
    code = """
        from autobatch.virtual.device import VirtualGPU
        VirtualGPU("a100-40gb").attach()
        import torch
        p = torch.cuda.get_device_properties(0)
        print(p.name, p.total_memory, p.major, p.minor, p.multi_processor_count, sep="|")
        free, total = torch.cuda.mem_get_info()
        print(total - free)
        torch.empty(1, device="cuda")
    """
    folder, runtime = tmp_path_factory.mktemp("program"), tmp_path_factory.mktemp("runtime")
    return run(code, folder, XDG_RUNTIME_DIR=str(runtime)), list(runtime.iterdir())


def test_torch_sees_the_card_of_the_catalog(a_program):
    card = find_card("a100-40gb")
    properties, outside = a_program[0].splitlines()
    assert properties == f"{card.title}|{card.total_bytes}|8|0|108"
    assert int(outside) == card.outside_bytes


def test_the_state_is_removed_at_the_end(a_program):
    assert a_program[1] == []


def test_out_of_memory_is_torchs_own(attached):
    code = """
        kept = torch.empty(7 << 30, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            print(str(error).split(".")[0])
        print(torch.cuda.memory_stats()["num_ooms"])
    """
    assert attached(code).splitlines() == ["CUDA out of memory", "1"]


def test_nvml_tells_the_same(attached):
    code = """
        import os, pynvml
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        [process] = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        print(pynvml.nvmlDeviceGetMemoryInfo(handle).used, process.pid == os.getpid(), process.usedGpuMemory)
        print(pynvml.nvmlDeviceGetUUID(handle) == f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    """
    used = GIB + 256 * MIB
    assert attached(code).splitlines() == [f"{used} True {used}", "True"]


def test_several_cards_in_one_process(attached):
    code = """
        print(torch.cuda.device_count(), len({str(torch.cuda.get_device_properties(i).uuid) for i in range(3)}))
        kept = [torch.empty(6 << 30, dtype=torch.uint8, device=f"cuda:{i}") for i in range(3)]
        print([torch.cuda.memory_reserved(i) >> 30 for i in range(3)])
        moved = torch.ones(4, device="cuda:1").to("cuda:2")
        print(moved.device)
    """
    assert attached(code).splitlines() == ["3 3", "[6, 6, 6]", "cuda:2"]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import torch", "torch is imported already"),
        ("VirtualGPU('t4').attach()", "already"),
        ("gpu.attach()", "already"),
    ],
    ids=["torch", "another card", "the same card"],
)
def test_too_late_or_twice_is_said(tmp_path, before, said):
    code = f"""
        from autobatch.errors import DeviceError
        from autobatch.virtual.device import VirtualGPU
        gpu = VirtualGPU("t4")
        {before}
        try:
            gpu.attach()
        except DeviceError as error:
            print(error)
    """
    assert said in run(code, tmp_path)


def test_a_process_that_inherited_one_cannot_attach_another(tmp_path):
    code = """
        import subprocess, sys
        from autobatch.errors import DeviceError
        from autobatch.virtual.device import VirtualGPU
        try:
            VirtualGPU("t4").attach()
        except DeviceError as error:
            print("refused:", error)
        else:
            subprocess.run([sys.executable, __file__], check=True)
    """
    assert run(code, tmp_path).startswith("refused: this process has virtual GPUs already")


def test_a_process_that_inherited_one_from_behind_a_link_knows_it(tmp_path):
    code = """
        import subprocess, sys
        from autobatch.errors import DeviceError
        from autobatch.virtual.attach import present_state
        from autobatch.virtual.device import VirtualGPU
        inherited = present_state()
        gpu = VirtualGPU("t4")
        try:
            gpu.attach()
        except DeviceError as error:
            print(str(inherited) == sys.argv[1], error)
        else:
            subprocess.run([sys.executable, __file__, gpu.state_path], check=True)
    """
    link = tmp_path / "cache"
    link.symlink_to(user_cache_path())
    done = run(code, tmp_path, XDG_CACHE_HOME=str(link))
    assert done.startswith("True this process has virtual GPUs already")


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_have_the_same_card(attached, method):
    code = f"""
        import multiprocessing

        def free(queue):
            import torch
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            queue.put(torch.cuda.mem_get_info()[0])

        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            queue = context.Queue()
            child = context.Process(target=free, args=(queue,))
            child.start()
            in_child = queue.get()
            child.join()
            print(in_child >> 20, torch.cuda.mem_get_info()[0] >> 20)
    """
    # The child's context and tensor are gone when the parent looks, and the parent's own context has come.
    assert attached(code).split() == [str(8192 - 256 - 1024), str(8192 - 256)]


def test_triton_finds_the_driver(attached, tmp_path):
    code = """
        import triton
        import triton.language as tl

        @triton.jit
        def double(x, n, BLOCK: tl.constexpr):
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

        x = torch.zeros(1024, device="cuda")
        print(double[(8,)](x, 1024, BLOCK=128).metadata.target.arch)
    """
    assert attached(code, TRITON_CACHE_DIR=str(tmp_path / "cache")) == "86\n"


def test_cuda_visible_devices_is_honoured(attached):
    code = """
        import os
        from autobatch.virtual.state import read_state
        uuids = [card.uuid for card in read_state(gpu.state_path)]

        def seen(visible):
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
            found = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
            print(repr(visible if visible not in uuids else "uuid"), [uuids.index(uuid) for uuid in found], flush=True)

        for visible in ("1", "1,0", "", "-1", "0,7,1", uuids[1]):
            if os.fork() == 0:  # torch is imported and has not looked for a GPU: each child decides for itself
                seen(visible)
                os._exit(0)
            os.wait()
    """
    assert attached(code).splitlines() == [
        "'1' [1]",
        "'1,0' [1, 0]",
        "'' []",
        "'-1' []",
        "'0,7,1' [0]",
        "'uuid' [1]",
    ]


def test_the_attached_device_measures(attached):
    code = """
        from autobatch.device.base import Device
        assert isinstance(gpu, Device) and not gpu.isolation().required
        gpu.reset_peaks()
        x = torch.empty(3 << 30, dtype=torch.uint8, device=gpu.torch_device)
        m = gpu.measure()
        print(m.peak_allocated_bytes >> 20, m.device_used_bytes >> 20, gpu.held_bytes() >> 20, gpu.budget_bytes() >> 20)
        info = gpu.info()
        print(info.virtual, info.total_bytes - info.free_bytes >> 20, info.others)
        with gpu.restrict(2 << 30):
            try:
                torch.empty(1 << 20, device="cuda")
            except torch.OutOfMemoryError:
                print("restricted")
    """
    assert attached(code).splitlines() == ["3072 3328 3072 4096", "True 3328 ()", "restricted"]
