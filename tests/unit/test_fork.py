"""Live objects on host memory: tried in forks of this process, which can be lost."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from torch import nn

from autobatch import BatchSizeResult, InvalidArgumentError, VirtualGPU, Workload, find
from autobatch.device.host import CHILD_ENVIRONMENT, HostDevice
from autobatch.probe.processes import fork
from autobatch.probe.state import fingerprint
from autobatch.testing import FakeDevice
from autobatch.units import GIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux alone")


def answer(workload: Any, **options: Any) -> BatchSizeResult:
    return find(
        workload, **{"device": "cpu", "memory_limit": "1GiB", "multiple_of": 1, "max_batch_size": 16, **options}
    )


def live() -> Workload:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(
        model,
        optimizer,
        nn.functional.cross_entropy,
        lambda n: (torch.randn(n, 3, 32, 32), torch.zeros(n, dtype=torch.long)),
    )


def train(workload: Workload) -> None:
    """Steps of the caller's own: every pool of threads that there is has been started, and gradients are alive."""
    for _ in range(2):
        workload.train_step(64)
    torch.linalg.svd(torch.randn(256, 256))
    workload.model(torch.randn(4, 3, 32, 32)).sum().backward()


def test_a_process_whose_threads_were_used_is_forked_and_left_as_it_was() -> None:
    workload = live()
    train(workload)
    gradients = [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]
    before, limit = fingerprint(*workload.stateful), resource.getrlimit(resource.RLIMIT_DATA)
    result = answer(workload)
    assert (result.batch_size, result.environment["trials_in"]) == (16, "forks of this process")
    assert any(note.startswith("More may fit in a process that is started with MALLOC_") for note in result.notes)
    assert fingerprint(*workload.stateful) == before
    assert len(gradients) == 4
    kept = zip(gradients, workload.model.parameters(), strict=True)
    assert all(p.grad is not None and torch.equal(gradient, p.grad) for gradient, p in kept)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
    assert not psutil.Process().children(recursive=True)


def test_a_crash_is_a_size_that_does_not_fit_and_not_the_end_of_this_process() -> None:
    def step(n: int) -> None:
        if n > 5:
            faulthandler.disable()  # pytest's would print the whole stack
            signal.raise_signal(signal.SIGSEGV)  # in this thread: another's may come after the step has ended

    result = answer(step)
    assert (result.batch_size, result.smallest_failure) == (5, 6)
    assert any("SIGSEGV" in trial.message for trial in result.trials)
    doubt = (
        "A batch of 6 is taken to run out of memory because smaller ones pass: the child process was killed by SIGSEGV."
    )
    assert doubt in result.notes


def test_an_error_of_the_workload_s_own_flies_with_where_it_came_from() -> None:
    def step(n: int) -> None:
        if n > 5:
            raise KeyError(f"row {n}")

    with pytest.raises(KeyError, match="row") as caught:
        answer(step)
    assert "raise KeyError" in str(caught.value.__cause__)


def test_state_of_a_step_needs_no_name_because_the_fork_takes_it_along() -> None:
    steps: list[int] = []
    result = answer(steps.append, max_batch_size=2)
    assert not steps
    assert not [note for note in result.notes if "state=" in note]


def test_what_a_trial_starts_ends_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def step(n: int) -> None:
        sleeper = subprocess.Popen(["sleep", "600"])
        with pids.open("a") as file:
            file.write(f"{sleeper.pid}\n")

    answer(step, max_batch_size=2)
    started = [int(line) for line in pids.read_text().split()]
    assert started
    deadline_s = time.monotonic() + 5
    while any(map(psutil.pid_exists, started)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not [pid for pid in started if psutil.pid_exists(pid)]


def test_what_was_there_before_is_frozen_here_and_seen_again_afterwards() -> None:
    seen = list[int]()
    gc.unfreeze()
    try:
        answer(live(), on_trial=lambda trial: seen.append(gc.get_freeze_count()))
        assert min(seen) > 1000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


ROOMS = """
import mmap
import os

import torch
from autobatch import Workload, find

MIB = 1 << 20


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(16 * MIB // 4))

    def forward(self, x):
        low, high = 0, 1024
        while high - low > 1:
            middle = (low + high) // 2
            try:  # no tensor: the one that barely fits finds its place on the heap, and leaves a hole there
                mmap.mmap(-1, middle * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
                low = middle
            except OSError:
                high = middle
        with open(os.environ["ROOMS"], "a") as file:
            file.write(f"{low} ")
        return x * self.weight[:1]


MADE = Model()


def around_what_is_made():
    return Workload(MADE, None, lambda output, target: output.sum(), lambda n: (torch.ones(n, 1), torch.zeros(n)))


def room(workload, **options):
    open(os.environ["ROOMS"], "w").close()
    find(workload, device="cpu", memory_limit="256MiB", max_batch_size=1, **options)
    rooms = list(map(int, open(os.environ["ROOMS"]).read().split()))
    print(min(rooms), max(rooms))


if __name__ == "__main__":
    room(around_what_is_made())
    room(around_what_is_made(), isolate=False)
    room(around_what_is_made)
    MADE(torch.ones(1, 1)).sum().backward()  # gradients that no Python object stands for
    room(around_what_is_made())
"""


def test_a_model_that_is_there_counts_and_nothing_else_does_wherever_its_trials_run(tmp_path: Path) -> None:
    script = tmp_path / "rooms.py"
    script.write_text(ROOMS)
    environment = {**os.environ, **CHILD_ENVIRONMENT, "OMP_NUM_THREADS": "1", "ROOMS": str(tmp_path / "rooms")}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (tmp_path / "rooms").read_text() + done.stderr
    assert list(map(int, done.stdout.split())) == [pytest.approx(0.95 * 256 - 16, abs=3)] * 8


def test_a_text_that_waits_to_be_written_is_written_once() -> None:
    code = (
        "import sys, autobatch\n"
        "sys.stdout.write('before ')\n"
        "r = autobatch.find(lambda n: None, device='cpu', memory_limit='1GiB', max_batch_size=2)\n"
        "print(r.environment['trials_in'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "before forks of this process\n"


def test_in_this_process_when_asked_to_or_where_a_fork_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def step(n: int) -> None:
        seen.append(os.getpid())

    assert answer(step, isolate=False).environment["trials_in"] == "this process"

    def hang() -> NoReturn:
        while True:
            time.sleep(1)

    monkeypatch.setattr(fork, "_TRIED_WITHIN_S", 0.2)
    monkeypatch.setattr(fork, "_train_a_little", hang)
    assert not fork.forks_are_safe()
    assert answer(step).environment["trials_in"] == "this process"
    with pytest.raises(InvalidArgumentError, match="isolate"):
        answer(step, isolate=True)
    assert set(seen) == {os.getpid()}
    assert not psutil.Process().children(recursive=True)


def test_the_host_alone_says_that_a_fork_can_try_what_is_here() -> None:
    others = (FakeDevice(GIB, lambda n: n), VirtualGPU("t4"))
    assert HostDevice().isolation().forks
    assert not [device for device in others if device.isolation().forks]
