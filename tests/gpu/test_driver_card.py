"""What a virtual card says of itself, against a real one."""

import json
from pathlib import Path

import pytest

from tests.gpu.machines import Machine

pytestmark = pytest.mark.gpu

ATTRIBUTES = """
import ctypes, json
driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
ask = lambda number: driver.cudaDeviceGetAttribute(ctypes.byref(value), number, 0)
print(json.dumps({number: value.value for number in range(1, 160) if ask(number) == 0}))
"""
PCI_BUS = "33"


@pytest.mark.parametrize("gpu", ["nvidia_h200", "nvidia_h100_80gb_hbm3"])
def test_what_a_card_says_of_itself_is_what_a_real_one_says(tmp_path, gpu):
    """Features that it does not have, which are 0, aside. cuDNN's plans and Inductor's timing go by these figures."""
    real = json.loads((Path(__file__).parents[1] / "data" / f"device_{gpu}.json").read_text())
    known = real["torch"]
    figures = {"total_bytes": int(known["total_memory"]), "multiprocessors": int(known["multi_processor_count"])}
    machine = Machine(tmp_path, capability=(int(known["major"]), int(known["minor"])), **figures)
    told = {number: value for number, value in json.loads(machine.run("-c", ATTRIBUTES)).items() if value}
    assert len(told) > 30
    assert {number for number, value in told.items() if real["attributes"][number] != value} == {PCI_BUS}
