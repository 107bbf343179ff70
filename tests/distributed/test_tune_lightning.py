"""tune() and the callback AutoBatch for Lightning on two ranks that torchrun starts, each with a limit of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from tests.distributed.launch import ROOT

pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux"),
]

SCRIPT = ROOT / "tests" / "integration" / "tune_lightning.py"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank found, by the name of what it ran."""
    print(f"lightning {version('lightning')}, torch {version('torch')}")
    folder, names = tmp_path_factory.mktemp("ranks"), ("train_on_two_ranks", "refuse_on_two_ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder), *names],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in names}


def test_two_ranks_take_the_numbers_of_the_one_with_less_memory_and_train_on(said: dict[str, list[Any]]) -> None:
    first, second = said["train_on_two_ranks"]
    assert first == second  # weights too: the ranks' gradients were averaged as ever
    assert set(first) == {"tune", "callback"}
    for found in first.values():
        micro = found["plan"]["micro_batch_size"]
        assert 8 <= micro <= found["fits"] < 64  # the other rank alone could take more
        assert found["where"] == "forks of this process"
        outcomes = {outcome for _, outcome in found["trials"]}
        # What a rank's heap has free holds some of what is too much.
        assert {"fits"} < outcomes <= {"fits", "oom", "over_headroom"}
        assert (found["batch"], found["accumulate"]) == (micro, 64 // micro)
        # 256 samples, of which each rank has 128; an optimizer step takes 64 of each.
        assert found["batches"] == 128 // micro
        assert found["global_step"] == 2
        assert found["steps"] == [64 // micro, 128 // micro]


def test_a_step_that_runs_collectives_is_refused_on_both(said: dict[str, list[Any]]) -> None:
    for refused in said["refuse_on_two_ranks"]:
        assert "has a step that runs a collective" in refused["message"]
        assert "autobatch probe -- COMMAND" in refused["message"]
        assert (refused["accumulate"], refused["batch"]) == (1, 4)
