"""Records what the GPU of this machine says of itself (``tests/data/device_<device>.json``).

What torch tells of it, and the driver's attributes by their numbers in ``CUdevice_attribute``. A test holds a virtual
card of the same figures against the file, as cuDNN's plans and Inductor's timing go by them::

    python -m benchmarks.record_device [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import Place, environment, forked
from benchmarks.records import file_for

DATA = Path(__file__).parents[1] / "tests" / "data"
_DEVICE = "cuda:0"
_NUMBERS = range(1, 160)


def told() -> dict[str, Any]:
    """What torch and the driver tell of the GPU. To be asked in a fork: it makes a context."""
    import torch

    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    named = {name: getattr(properties, name) for name in dir(properties) if not name.startswith("_")}
    plain = {name: str(value) for name, value in named.items() if name != "uuid" and isinstance(value, (int, str))}
    driver, value, attributes = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), {}
    for number in _NUMBERS:
        if driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0) == 0:
            attributes[str(number)] = value.value
    return {"torch": plain, "attributes": attributes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    file = options.json or DATA / file_for("device", environment(Place(device=_DEVICE))).name
    found = forked(told)
    if "error" in found:
        raise SystemExit(found["error"])
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **found}, indent=1) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
