"""``autobatch devices``: one row a device, unknown where the driver does not tell, JSON with the same figures."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from autobatch.cli import main
from autobatch.device import local, nvml
from autobatch.device.base import DeviceInfo, GpuProcess
from autobatch.units import GIB
from autobatch.virtual.catalog import cards

A100 = DeviceInfo(
    name="NVIDIA A100-SXM4-40GB",
    kind="cuda",
    index=0,
    uuid="GPU-1",
    total_bytes=40 * GIB,
    free_bytes=18 * GIB,
    others=(GpuProcess(pid=77, name="python train.py", used_bytes=22 * GIB),),
    capability="8.0",
    driver="580.1",
)
HIDDEN = DeviceInfo(name="NVIDIA T4", kind="cuda", uuid="GPU-2", details={"others_unknown": True})


def run(*arguments: str) -> str:
    shown = CliRunner().invoke(main, ["devices", *arguments])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "list_gpus", lambda: [A100, HIDDEN])
    monkeypatch.setattr(local, "local_names", lambda: ["cuda:0", "cpu"])


def row(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


@pytest.mark.usefixtures("two_gpus")
class TestTable:
    def test_a_gpu_with_its_figures_and_who_uses_it(self):
        shown = row(run(), "cuda:0")
        for part in ("NVIDIA A100-SXM4-40GB", "40.00 GiB", "18.00 GiB", "8.0", "580.1", "22.00 GiB  python train.py"):
            assert part in shown
        assert "(pid 77)" in shown

    def test_what_the_driver_does_not_tell_is_unknown(self):
        shown = row(run(), "not torch's")
        assert "NVIDIA T4" in shown
        assert shown.count("unknown") == 5  # total, free, capability, driver, others

    def test_the_host_is_always_there_and_so_is_torchs_view(self):
        shown = run()
        assert "host memory" in row(shown, "cpu")
        assert "can use: cuda:0, cpu" in shown.splitlines()[-1]

    def test_json_has_bytes_and_null_for_unknown(self):
        plain = json.loads(run("--json"))
        a100, hidden, host = plain["devices"]
        assert (a100["torch_device"], a100["total_bytes"], a100["others"][0]["pid"]) == ("cuda:0", 40 * GIB, 77)
        assert (hidden["torch_device"], hidden["total_bytes"]) == (None, None)
        assert host["torch_device"] == "cpu"
        assert plain["torch"]["devices"] == ["cuda:0", "cpu"]


def test_virtual_lists_the_whole_catalog():
    shown = run("--virtual")
    for card in cards():
        assert row(shown, card.name + " ")
    plain = json.loads(run("--virtual", "--json"))
    assert [card["name"] for card in plain] == [card.name for card in cards()]
    assert all(card["sources"]["total_bytes"] for card in plain)
