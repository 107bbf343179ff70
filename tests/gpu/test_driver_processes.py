"""The shared state under several processes. The driver is called directly, which takes no torch and little time."""

import re
import signal
import subprocess
import sys
import time

import pytest

from autobatch.units import GIB, MIB
from autobatch.virtual.catalog import cards
from tests.gpu.machines import Machine

pytestmark = pytest.mark.gpu

CALLS = """
import ctypes, os, sys, time
cuda = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
def malloc(bytes):
    address = ctypes.c_void_p()
    error = cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(bytes))
    return (error, address.value)
def free(address):
    return cuda.cudaFree(ctypes.c_void_p(address))
def memory():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    error = cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return (error, free.value, total.value)
"""
OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM = 2, 3, 304


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, outside_bytes=100 * MIB)


def run(machine, code, **variables):
    return machine.run("-c", CALLS + code, **variables)


def hold(machine, bytes):
    process = machine.start("-c", CALLS + f"print(malloc({bytes})[0], flush=True); sys.stdin.read()")
    assert process.stdout.readline() == "0\n"
    return process


def test_a_context_takes_what_stands_outside_and_gives_it_back_at_the_end(machine):
    code = "n = ctypes.c_int(); cuda.cudaGetDeviceCount(ctypes.byref(n)); print(n.value); input(); print(memory())"
    with machine.start("-c", CALLS + code) as process:
        assert process.stdout.readline() == "1\n"
        assert machine.state()[0].processes == ()  # counting devices makes no context
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"(0, {8 * GIB - 100 * MIB}, {8 * GIB})\n"
    [one] = machine.state()[0].processes
    assert (one.alive, one.used_bytes, one.peak_bytes) == (False, 0, 100 * MIB)


KERNELS = """
import torch
x = torch.zeros(3, device="cuda")
shuffled = torch.randperm(50000, device="cuda")
print(torch.cuda.get_device_capability(), len(x.cumsum(0)), x.nonzero().shape, len(shuffled))
embedding = torch.nn.Embedding(100, 8, device="cuda")
embedding(torch.zeros(4000, dtype=torch.long, device="cuda")).sum().backward()
"""


@pytest.mark.parametrize("capability", sorted({card.capability for card in cards() if card.capability >= (7, 5)}))
def test_kernels_are_launched_on_every_capability_of_the_catalog(forks, tmp_path, capability):
    """CUB looks up how, by the architecture of the code that a card loads, which for 8.9 is that for 8.6."""
    out = forks.run(KERNELS, **Machine(tmp_path, capability=capability).environment())
    assert out == f"{capability} 3 torch.Size([0, 1]) 50000\n"


def test_a_context_that_does_not_fit_is_out_of_memory(machine):
    with hold(machine, 8 * GIB - 150 * MIB) as process:
        assert run(machine, "print(memory()[0])") == f"{OUT_OF_MEMORY}\n"
        process.stdin.close()
    assert run(machine, "print(memory()[0])") == "0\n"


def test_memory_comes_in_granules_and_to_the_last_of_them(machine):
    room = 8 * GIB - 100 * MIB
    code = f"""
print(malloc({room} + 1)[0], malloc({room} - {2 * MIB} + 1)[0], memory()[1], malloc(1)[0])
"""
    assert run(machine, code) == f"{OUT_OF_MEMORY} 0 0 {OUT_OF_MEMORY}\n"
    assert machine.state()[0].processes[0].refused_allocations == 2


def test_a_killed_process_gives_its_memory_back_before_anyone_waits_for_it(machine):
    with hold(machine, 6 * GIB) as process:
        assert run(machine, "print(malloc(4 << 30)[0])") == f"{OUT_OF_MEMORY}\n"
        process.kill()
        deadline = time.monotonic() + 20
        while machine.state()[0].used_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        # It is a zombie now: nobody has waited for it.
        assert run(machine, "print(malloc(4 << 30)[0])") == "0\n"


def test_a_forked_child_owns_nothing_and_changes_nothing(machine):
    code = """
error, address = malloc(1 << 30)
before = memory()
if os.fork() == 0:
    print(malloc(1)[0], free(address), memory()[0], flush=True)
    os._exit(0)
os.wait()
print(memory() == before, free(address))
"""
    assert run(machine, code).splitlines() == [f"{NOT_INITIALIZED} {NOT_INITIALIZED} {NOT_INITIALIZED}", "True 0"]


def test_a_child_forked_before_the_first_use_has_a_context_of_its_own(machine):
    code = """
n = ctypes.c_int(); cuda.cudaGetDeviceCount(ctypes.byref(n))
if os.fork() == 0:
    print(malloc(1 << 30)[0], flush=True)
    os._exit(0)
os.wait()
print(memory()[1])
"""
    assert run(machine, code) == f"0\n{8 * GIB - 100 * MIB}\n"
    assert sorted(p.peak_bytes for p in machine.state()[0].processes) == [100 * MIB, GIB + 100 * MIB]


def test_exec_leaves_nothing_of_the_program_before_it(machine):
    code = """
if len(sys.argv) == 1:
    malloc(5 << 30)
    os.execv(sys.executable, [sys.executable, "-c", source, "again"])
print(memory()[1])
"""
    assert run(machine, f"source = {CALLS + code!r}\n{code}") == f"{8 * GIB - 100 * MIB}\n"


def test_the_lock_survives_holders_that_are_killed(machine):
    hammer = CALLS + "\nprint(flush=True)\nwhile True: free(malloc(2 << 20)[1])"
    for _ in range(5):
        processes = [machine.start("-c", hammer) for _ in range(3)]
        for process in processes:
            process.stdout.readline()
        time.sleep(0.05)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert run(machine, f"print(malloc({8 * GIB - 100 * MIB})[0])") == "0\n"


def test_threads_forking_and_allocating_at_once(machine):
    code = """
import threading
def work():
    for _ in range(300): free(malloc(2 << 20)[1])
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for _ in range(20):
    if os.fork() == 0: malloc(1); os._exit(0)
    os.wait()
for thread in threads: thread.join()
print(memory()[1])
"""
    assert run(machine, code) == f"{8 * GIB - 100 * MIB}\n"


def test_the_chosen_allocation_fails_and_no_other(tmp_path):
    machine = Machine(tmp_path, fail=3)
    assert run(machine, "print([malloc(1)[0] for _ in range(5)])") == f"[0, 0, {OUT_OF_MEMORY}, 0, 0]\n"


def test_so_many_allocations_in_a_row_fail_from_now_on(machine):
    code = """
import os
from pathlib import Path
from autobatch.virtual.state import STATE_VARIABLE
from autobatch.virtual.state import refuse_allocations
print([malloc(1)[0] for _ in range(3)])
refuse_allocations(Path(os.environ[STATE_VARIABLE]), 1, count=2)
print([malloc(1)[0] for _ in range(5)])
"""
    assert run(machine, code) == f"[0, 0, 0]\n[0, {OUT_OF_MEMORY}, {OUT_OF_MEMORY}, 0, 0]\n"


def test_addresses_fall_and_are_used_again_when_the_range_ends(machine):
    code = """
import resource
# Room for the card and little more than once.
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
addresses = [malloc(10 << 20)[1] for _ in range(5)]
print(addresses == sorted(addresses, reverse=True))
for address in addresses[::2]: free(address)
for _ in range(100):
    error, address = malloc(5 << 30)
    assert error == 0 and free(address) == 0
blocks = [malloc(2 << 20) for _ in range(3000)]
print(len({address for _, address in blocks} | set(addresses[1::2])), {error for error, _ in blocks})
"""
    assert run(machine, code) == "True\n3002 {0}\n"


def test_a_gpu_that_does_not_answer_is_no_failure_of_the_workload(forks, machine):
    code = """
import resource, torch
from autobatch.device.cuda import CudaDevice
from autobatch.errors import DeviceError
device = CudaDevice("cuda")
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    device.reset_peaks()
except DeviceError as error:
    print(error)
"""
    assert forks.run(code, **machine.environment()).startswith("cuda:0 cannot be used: CUDA error: OS call failed")


def test_too_little_address_space_is_a_clear_error_and_no_lack_of_memory(machine):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
print(malloc(1)[0])
"""
    with machine.start("-c", CALLS + code) as process:
        out, err = process.communicate()
    assert out == f"{OPERATING_SYSTEM}\n"
    assert re.search(r"needs 9 GiB of address space.*limit of this process is 4 GiB \(ulimit -v\)", err, re.DOTALL)


def test_without_a_limit_on_address_space_none_is_told(machine):
    code = """
import mmap
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
size = 64 << 40
while size >= 1 << 30:  # all there is, in ever smaller pieces
    place = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)
    size //= 2 if place == 2**64 - 1 else 1
print(malloc(1)[0])
"""
    with machine.start("-c", CALLS + code) as process:
        out, err = process.communicate()
    assert out == f"{OPERATING_SYSTEM}\n"
    assert re.search(r"needs 9 GiB of address space.*this process has no limit", err, re.DOTALL)
    assert "-1" not in err


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("1, 9, 2", [1]),
        ("", []),
        ("-1", []),
        ("1,1", []),
        ("GPU-", []),
        ("{uuid2},0", [2, 0]),
        ("{uuid1:.12}", [1]),
    ],
)
def test_visible_devices(tmp_path, visible, indices):
    machine = Machine(tmp_path, cards=3)
    uuids = [card.uuid for card in machine.state()]
    code = """
n = ctypes.c_int(); cuda.cudaGetDeviceCount(ctypes.byref(n))
buses = []
for device in range(n.value):
    text = ctypes.create_string_buffer(20); cuda.cudaDeviceGetPCIBusId(text, 20, device)
    buses.append(int(text.value.split(b":")[1], 16) - 1)
print(buses)
"""
    variables = {}
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible.format(uuid1=uuids[1], uuid2=uuids[2])
    assert run(machine, code, **variables) == f"{indices}\n"


@pytest.mark.parametrize("content", [None, b"", b"abvgpu\r\n" + bytes(5000), "other version"])
def test_without_a_good_state_there_is_no_device_and_it_says_why(machine, content):
    if content is None:
        machine.path.unlink()
    elif isinstance(content, bytes):
        machine.path.write_bytes(content)
    else:
        data = bytearray(machine.path.read_bytes())
        data[8] += 1
        machine.path.write_bytes(data)
    code = "n = ctypes.c_int(7); print(cuda.cudaGetDeviceCount(ctypes.byref(n)), n.value, malloc(1)[0])"
    with machine.start("-c", CALLS + code) as process:
        out, err = process.communicate()
    assert out == "100 0 100\n"
    assert err.count(str(machine.path)) == 1
    assert ("No such file" if content is None else "not a state file of this version") in err


def test_without_the_variable_there_is_no_device_and_it_says_why(machine):
    code = CALLS + "print(cuda.cuInit(0))"
    variables = {k: v for k, v in machine.environment().items() if k != "AUTOBATCH_VIRTUAL_STATE"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "100\n"
    assert "AUTOBATCH_VIRTUAL_STATE is not set" in done.stderr


def test_many_places_are_used_again_when_their_processes_are_gone(machine):
    code = """
n = ctypes.c_int(); cuda.cudaGetDeviceCount(ctypes.byref(n))
for _ in range(4200):
    if os.fork() == 0: os._exit(malloc(7 << 30)[0])
    assert os.wait()[1] == 0
"""
    run(machine, code)
    assert len(machine.state()[0].processes) == 4096


TAKEN_APART = """
import gc, os, torch
stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
event.record()
pinned = torch.empty(10, pin_memory=True)
there = pinned.to("cuda", non_blocking=True)
there.record_stream(stream)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = there + 1
things = dict(stream=stream, event=event, pinned=pinned, there=there, graph=graph, result=result)
del stream, event, pinned, there, graph, result
for name in list(things):
    if os.fork() == 0:
        things.clear()
        gc.collect()
        os._exit(0)
    assert os.wait()[1] == 0, name
    del things[name]
"""


def test_a_forked_child_takes_its_parents_objects_apart(forks, machine):
    forks.run(TAKEN_APART, **machine.environment())


def test_launches_that_no_card_can_do_are_refused_as_such(machine):
    code = """
class Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]
def launch(grid, block):
    return cuda.cudaLaunchKernel(ctypes.c_void_p(1), Dim3(*grid), Dim3(*block), None, ctypes.c_size_t(0), None)
print(launch((1, 1, 1), (1024, 1, 1)), launch((1 << 30, 65535, 65535), (8, 8, 8)))
print(launch((1, 1, 1), (1025, 1, 1)), launch((1, 65536, 1), (1, 1, 1)), launch((0, 1, 1), (1, 1, 1)))
cuda.cudaGetErrorString.restype = ctypes.c_char_p
print(cuda.cudaGetErrorString(9).decode())
"""
    assert run(machine, code) == "0 0\n9 9 9\ninvalid configuration argument\n"
