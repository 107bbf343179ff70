"""Probes that share a GPU: one waits for the other, and one that is killed leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from autobatch.probe.cache import CACHE_VARIABLE, ResultCache
from autobatch.virtual.attach import environment, temporary_state
from autobatch.virtual.catalog import find_card

TARGET = """
    import torch
    from autobatch.probe.workload import Workload

    def build(device):
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, device=device) for _ in range(4)))
        return Workload(model, torch.optim.AdamW(model.parameters()), lambda output, _: output.mean(),
                        lambda n: torch.zeros(n, 256, device=device))
"""
MARK = "AUTOBATCH_TEST_MARK"
GONE_WITHIN_S = 20.0


class Bench:
    """Probes of one small virtual card that all of them share, with the cache on."""

    def __init__(self, folder: Path, state_path: Path) -> None:
        self.target = folder / "target_of_mine.py"
        self.target.write_text(textwrap.dedent(TARGET))
        self.cache = ResultCache(folder / "answers")
        self.lock = state_path.with_name("probe-0.lock")
        self.mark = uuid.uuid4().hex
        variables = {MARK: self.mark, CACHE_VARIABLE: str(self.cache.folder)}
        self.variables = {**os.environ, **environment(state_path), **variables}

    def start(self, cap: int) -> subprocess.Popen[str]:
        """Every cap is another question, so that each probe that is left alone keeps an answer."""
        command = [sys.executable, "-m", "autobatch", "probe", f"{self.target}:build", "--device", "cuda:0"]
        return subprocess.Popen(
            [*command, "--max-batch-size", str(cap)],
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def living(self) -> list[psutil.Process]:
        """Every process of a probe, also one whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def check_nothing_is_left(self) -> None:
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while left := self.living():
            assert time.monotonic() < deadline_s, f"still there: {left}"
            time.sleep(0.05)
        for path in (self.lock, self.cache.folder / ".lock"):
            if path.exists():
                with FileLock(path, timeout=0):
                    pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.cache.entries()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with temporary_state([find_card("memory=1GiB,capability=8.0")]) as state_path:
        made = Bench(tmp_path_factory.mktemp("bench"), state_path)
        yield made
        for process in made.living():
            process.kill()


@dataclass
class Waited:
    """A probe of cap 1000 that found another at work, which ended as soon as it said so."""

    told: bool
    was_there: bool
    output: str
    took_s: float


@pytest.fixture(scope="module")
def waited(bench: Bench) -> Waited:
    started_s = time.monotonic()
    with FileLock(bench.lock):
        probe = bench.start(1000)
        assert probe.stdout is not None
        lines = iter(probe.stdout.readline, "")
        told = any(line.startswith("Warning: another probe is at work on cuda:0: waiting") for line in lines)
        was_there = probe.poll() is None
    output, _ = probe.communicate(timeout=200)
    took_s = time.monotonic() - started_s
    bench.check_nothing_is_left()
    return Waited(told, was_there, output, took_s)


@pytest.mark.skipif(sys.platform != "linux", reason="virtual GPUs need Linux")
def test_the_wait_is_told_and_ends_with_the_other_probe(waited: Waited) -> None:
    assert waited.told
    assert waited.was_there
    assert "Largest batch on " in waited.output


@pytest.mark.skipif(sys.platform != "linux", reason="virtual GPUs need Linux")
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(2, id="2"),
        pytest.param(100, id="100", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_kills_at_random_moments_leave_nothing(bench: Bench, waited: Waited, kills: int) -> None:
    assert "Largest batch on " in waited.output
    moments = random.Random(9)
    ended = 0
    for number in range(kills):
        probe = bench.start(1001 + kills + number)  # which no other test has asked for
        time.sleep(moments.uniform(0, 1.1 * waited.took_s))
        probe.send_signal(signal.SIGKILL)
        probe.communicate(timeout=120)
        ended += probe.returncode == 0
        bench.check_nothing_is_left()
    assert ended < kills / 2  # most were killed at work
    assert len(bench.cache.entries()) >= 1 + ended
    output, _ = bench.start(1000).communicate(timeout=120)
    assert "From the cache: found on " in output
    bench.check_nothing_is_left()


@pytest.mark.skipif(sys.platform != "linux", reason="virtual GPUs need Linux")
@pytest.mark.slow
def test_of_two_probes_of_one_gpu_the_second_waits_and_finds_the_same(bench: Bench) -> None:
    probes = [bench.start(cap) for cap in (10**9, 10**9 + 1)]
    outputs = [probe.communicate(timeout=200)[0] for probe in probes]
    answers = [line for output in outputs for line in output.splitlines() if line.startswith("Largest batch on ")]
    assert len(answers) == 2
    assert answers[0].split(". ")[0] == answers[1].split(". ")[0]
