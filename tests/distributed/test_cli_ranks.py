"""`torchrun -m autobatch probe TARGET`: one answer, printed once, and one exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autobatch import BatchSizeResult
from tests.distributed.launch import ROOT

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux"),
]

TARGETS = """
import os, torch
from torch import distributed, nn
from torch.nn.functional import mse_loss
from autobatch import Workload

def pairs(n):
    return torch.zeros(n, 64), torch.zeros(n, 1)

def wrapped(device):
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 1))
    model = nn.parallel.DistributedDataParallel(model)
    return Workload(model, torch.optim.AdamW(model.parameters()), mse_loss, pairs)

def uneven(device):
    width = int(os.environ["TEST_WIDTH"])  # a search of its own is told of no job
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))
    return Workload(model, torch.optim.AdamW(model.parameters()), mse_loss, pairs)

def broken(device):
    if os.environ["RANK"] == "1":
        raise KeyError("column 7")
    return wrapped(device)

def huge(device):
    workload = wrapped(device)
    workload.sample = lambda n: (torch.zeros(n, 10**9), torch.zeros(n, 1))
    return workload

def slow(device):
    import time
    time.sleep(60)
"""
LIMITED = ("--device", "cpu", "--memory-limit", "50MiB", "--multiple-of", "pow2")


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "targets.py").write_text(TARGETS)
    return f"{tmp_path}/targets.py"


class Ranks:
    """Two ranks with the environment that torchrun gives, whose codes and words are told apart."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "autobatch", "probe", *arguments],
                env={
                    **environment(),
                    **job,
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "TEST_WIDTH": str(4096 * 4 ** int(rank)),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]

    def end(self, within_s: float = 60) -> list[tuple[int, str, str]]:
        """The exit code of each, and what it printed to both streams."""
        ended = [(*process.communicate(timeout=within_s), process.returncode) for process in self.processes]
        return [(code, out, err) for out, err, code in ended]


@pytest.fixture
def started() -> Iterator[list[Ranks]]:
    """What a test starts, none of which outlives it."""
    several: list[Ranks] = []
    yield several
    for ranks in several:
        for process in ranks.processes:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_torchrun_prints_one_answer_once(target: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "autobatch", "probe"]
    words = [sys.executable, *launch, f"{target}:wrapped", *LIMITED, "--max-batch-size", "4"]
    words += ["--json", str(path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = BatchSizeResult.from_json(path.read_text())
    assert found.environment["ranks"] == 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("Largest")] == [
        line for line in lines if line.startswith(f"Largest batch on host memory: {found.batch_size} ")
    ]
    assert sum(line.startswith("Largest") for line in lines) == 1
    assert sum(line.startswith("trial=1 ") for line in lines) == 1
    assert "Note: 2 ranks agree: it fits on each of them." in lines


def test_each_rank_has_a_virtual_gpu_of_its_own(target: str, started: list[Ranks]) -> None:
    started.append(Ranks(f"{target}:wrapped", "--gpu", "memory=1GiB,capability=8.0", "--multiple-of", "pow2"))
    (first, out, _), (second, silent, _) = started[0].end()
    assert (first, second, silent) == (0, 0, "")
    assert "Largest batch on Virtual GPU 1GiB" in out


def test_each_rank_may_have_a_size_of_its_own(target: str, started: list[Ranks], tmp_path: Path) -> None:
    """Where devices or models are unequal, the smallest would hold the others back."""
    card, path = "memory=2GiB,capability=8.0", tmp_path / "result.json"
    started.append(Ranks(f"{target}:uneven", "--gpu", card, "--per-rank", "--json", str(path)))
    (first, out, said), (second, silent, also) = started[0].end()
    assert (first, second, silent) == (0, 0, ""), said + also
    large, small = BatchSizeResult.from_json(path.read_text()).environment["rank_sizes"]
    assert large > 3 * small
    assert f"Note: Each rank has a size of its own: {large}, {small}." in out.splitlines()


@pytest.mark.slow
def test_without_a_limit_the_line_says_that_memory_is_shared(target: str, started: list[Ranks]) -> None:
    started.append(Ranks(f"{target}:wrapped", "--device", "cpu", "--max-batch-size", "1"))
    (_, out, _), (_, silent, _) = started[0].end()
    assert "40% of what is available for each of 2 ranks" in out
    assert "Note: Each of the 2 ranks on this machine may have an equal part of its memory." in out
    assert silent == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(("huge", *LIMITED), 1, "Error: batch 1 does not fit on host memory", marks=pytest.mark.slow),
        pytest.param(("no_such_function", *LIMITED), 2, "Error: TARGET", marks=pytest.mark.slow),
        (("wrapped", "--device", "cuda"), 3, "Error: no device 'cuda:0' here"),
    ],
)
def test_an_error_of_all_ranks_is_said_by_one(
    target: str, started: list[Ranks], arguments: tuple[str, ...], code: int, said: str
) -> None:
    if code == 3 and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    started.append(Ranks(f"{target}:{arguments[0]}", *arguments[1:]))
    (first, _, err), (second, out, silent) = started[0].end()
    assert (first, second) == (code, code)
    assert said in err
    assert (out, silent.strip()) == ("", "")


def test_an_error_of_one_rank_is_shown_there_and_named_by_rank_0(target: str, started: list[Ranks]) -> None:
    started.append(Ranks(f"{target}:broken", *LIMITED))
    (first, _, err), (second, _, own) = started[0].end()
    assert (first, second) == (4, 4)
    assert "Error: rank 1 failed: KeyError: 'column 7'" in err
    assert 'raise KeyError("column 7")' in own


def test_a_command_is_refused(started: list[Ranks]) -> None:
    started.append(Ranks("--device", "cpu", "--", "python", "train.py", "{batch_size}"))
    (first, _, err), (second, _, silent) = started[0].end()
    assert (first, second) == (2, 2)
    assert "a COMMAND starts its ranks by itself" in err
    assert silent == ""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_rank_that_is_ended_ends_the_other(
    target: str, started: list[Ranks], number: signal.Signals, interruptible: None
) -> None:
    started.append(Ranks(f"{target}:slow", *LIMITED))
    first, second = (psutil.Process(process.pid) for process in started[0].processes)
    until_s = time.monotonic() + 40
    while not (first.children() and second.children()) and time.monotonic() < until_s:
        time.sleep(0.1)
    left = [*first.children(recursive=True), *second.children(recursive=True)]
    second.send_signal(number)
    (code, _, err), _ = started[0].end(within_s=30)
    assert code == 4
    assert "one of them is gone" in err or "rank 1 failed: it was" in err
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive
