"""Processes that end while torch's thread for backward has not: driver/ending.c."""

import signal

import pytest

from autobatch.units import MIB
from tests.gpu.machines import Machine

pytestmark = pytest.mark.gpu

TERMINATE = """
import ctypes, sys, threading, time
library = ctypes.CDLL("libstdc++.so.6")
cuda = ctypes.CDLL("libcuda.so.1")
print(cuda.cudaFree(None), flush=True)  # makes the context
def late():
    ctypes.CDLL(None).prctl(15, sys.argv[1].encode())  # PR_SET_NAME
    library._ZSt9terminatev()  # where C++ lands when a thread is made to end within a destructor
threading.Thread(target=late, daemon=True).start()
time.sleep(0.3)
print("ended")
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, outside_bytes=100 * MIB)


def test_a_thread_for_backward_that_comes_too_late_does_not_abort_the_process(machine):
    assert machine.run("-c", TERMINATE, "pt_autograd_0") == "0\nended\n"


def test_any_other_thread_still_does(machine):
    with machine.start("-c", TERMINATE, "pt_data_pin") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGABRT, "0\n")
    assert "terminate called without an active exception" in err
