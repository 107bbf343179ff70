"""What training takes on a virtual GPU, to the byte, as the first sketch of the driver gave it; ResNet as this one."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.gpu.machines import Machine

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("run_peaks.py").read_text()
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "sketch_peaks.json").read_text())
GROUPS = [
    "8.0 plain",
    "8.0 expandable",
    "8.0 world",
    pytest.param("8.6 plain", marks=pytest.mark.slow),
    pytest.param("9.0 plain", marks=pytest.mark.slow),
    pytest.param("8.0 compiled", marks=pytest.mark.slow),
]


def peaks(forks, machine, group, folder):
    variables = machine.environment(
        PYTORCH_ALLOC_CONF="expandable_segments:True" if group == "expandable" else "",
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        TRITON_CACHE_DIR=str(folder / "triton"),
    )
    output = forks.run(SCRIPT, group, **variables)
    return {case: found for case, *found in (json.loads(line) for line in output.splitlines() if line.startswith("["))}


@pytest.mark.parametrize("name", GROUPS)
def test_peaks_are_those_of_the_sketch(forks, name, tmp_path):
    installed = importlib.metadata.version("torch")
    if not RECORDED["torch"].startswith(installed.partition("+")[0]):
        pytest.skip(f"recorded with torch {RECORDED['torch']}, and this is {installed}")
    capability, group = name.split()
    major, minor = capability.split(".")
    machine = Machine(tmp_path, total_bytes=RECORDED["card"]["total_bytes"], capability=(int(major), int(minor)))
    assert peaks(forks, machine, group, tmp_path) == RECORDED["peaks"][name]
    assert machine.unwritten_answers() == {}
