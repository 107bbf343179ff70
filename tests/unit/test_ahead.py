"""A server that begins before it is asked for: taken by the search that needs one like it, else ended by its owner."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from autobatch.device.host import HostDevice
from autobatch.errors import WorkloadFailedError
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes.ahead import begun, server_for
from autobatch.probe.processes.job import job_of
from autobatch.probe.processes.server import Server
from autobatch.probe.trial import TrialRequest
from autobatch.result import Outcome
from tests.workloads import small

ISOLATION = HostDevice(memory_limit_bytes=1 << 28).isolation()
JOB = job_of(small.build, ISOLATION)


class Silent(Server):
    """Starts no process."""

    lives = True

    def __init__(self, environment: Any, paths: Any) -> None:
        self.environment, self.paths = environment, paths
        self.given: list[Any] = []
        self.closed = 0
        made.append(self)

    def give(self, job: Any, answer_within_s: float) -> None:
        self.given.append(job)

    def close(self) -> None:
        self.closed += 1


made: list[Silent] = []


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr("autobatch.probe.processes.ahead.Server", Silent)


def test_it_is_taken_once_with_a_job_of_whatever_kind(silent: None) -> None:
    other = replace(ISOLATION, memory_limit_bytes=1)
    with begun(ISOLATION):
        servers = [server_for(JOB, other, 1.0), server_for(JOB, ISOLATION, 1.0)]
    assert servers == made
    assert [(server.given, server.closed) for server in made] == [([JOB], 0), ([JOB], 0)]


def test_in_another_environment_another_is_made_and_it_ends_with_its_owner(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(ISOLATION):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        taken = server_for(JOB, ISOLATION, 1.0)
    assert made[1] is taken
    assert [server.closed for server in made] == [1, 0]
    assert server_for(JOB, ISOLATION, 1.0) is made[2]


class CannotBeImported:
    """As a target whose modules are missing where the trials run."""

    def import_modules(self) -> None:
        raise ImportError("no module for it")

    def __call__(self) -> None:
        raise AssertionError("it is not built")


def servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "worker import serve" in " ".join(child.cmdline())]


def test_one_that_nobody_took_is_a_process_and_leaves_none() -> None:
    with begun(ISOLATION):
        (child,) = servers()
    assert not child.is_running()


def tried(builder: Any, batch_size: int) -> Outcome:
    """How a trial of a search of its own ended."""
    with closing(ChildExecutor(builder, ISOLATION)) as child:
        request = TrialRequest(batch_size=batch_size, steps=2, limit_bytes=ISOLATION.memory_limit_bytes)
        return child.run(request).trial.outcome


def test_one_for_many_serves_searches_one_after_the_other_and_ends_with_its_owner() -> None:
    with begun(ISOLATION, many=True):
        (first,) = servers()
        assert tried(small.build, 1) is Outcome.FITS
        assert tried(small.build, 10_000) is Outcome.OOM
        with pytest.raises(WorkloadFailedError, match="SIGKILL"):
            tried(partial(small.odd, Path(os.devnull)), small.KILLED)
        assert tried(small.build_on, 1) is Outcome.FITS
        assert servers() == [first]
    assert not first.is_running()


def test_one_for_many_is_not_used_again_once_it_was_killed_or_could_not_import() -> None:
    with begun(ISOLATION, many=True):
        (first,) = servers()
        first.kill()
        first.wait()
        with pytest.raises(ImportError, match="no module for it"):
            tried(CannotBeImported(), 1)
    with begun(ISOLATION, many=True):
        (second,) = servers()
        with pytest.raises(ImportError, match="no module for it"):
            tried(CannotBeImported(), 1)
        assert not second.is_running()
