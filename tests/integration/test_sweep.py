"""``autobatch probe --sweep`` and ``--plot`` for real, on a GPU that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from autobatch.cli import main
from autobatch.probe.processes.server import Server

TARGET = """
    import torch
    from autobatch.probe.workload import Workload

    def build(device, seq_len=64):
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, device=device) for _ in range(4)))
        return Workload(model, torch.optim.AdamW(model.parameters()), lambda output, _: output.mean(),
                        lambda n: torch.zeros(n, seq_len, 256, device=device))

    def without(device):
        return build(device)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "target_of_mine.py"
    path.write_text(textwrap.dedent(TARGET))
    return path


GPU = ["--gpu", "memory=2GiB,capability=8.0"]


def probe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobatch", "probe", *map(str, arguments), *GPU]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_each_search_begins_where_the_last_ones_lead_and_one_server_is_enough(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, servers, start = tmp_path / "sweep.json", list[Server](), Server.__init__
    monkeypatch.setattr(Server, "__init__", lambda self, *args: (servers.append(self), start(self, *args))[1])
    words = ["probe", f"{script}:build", "--sweep", "seq_len=64,128,256", "--json", str(path), *GPU]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stderr) == (0, "")
    assert len(servers) == 1
    rows = json.loads(path.read_text())["results"]
    sizes = [row["batch_size"] for row in rows]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.05)
    assert sizes[1] / sizes[2] == pytest.approx(2, rel=0.05)
    trials = [[trial["batch_size"] for trial in row["result"]["trials"]] for row in rows]
    assert all(len(asked) <= 5 for asked in trials)
    # Beside the small ones from which allocations are told, nothing far from the answer.
    assert [n for size, asked in zip(sizes[1:], trials[1:], strict=True) for n in asked if 8 < n < 0.98 * size] == []


def test_an_option_that_the_function_does_not_take_names_the_sweep(script: Path):
    done = probe(f"{script}:without", "--sweep", "seq_len=64,128")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "Error: --sweep seq_len=64,128: must be left out, or a parameter 'seq_len' of without()"
    )


def test_a_search_is_drawn(script: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = probe(f"{script}:build", "--plot", tmp_path / "plot.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
