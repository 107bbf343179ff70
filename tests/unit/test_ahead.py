"""A server that begins before it is asked for: taken by the search that needs one like it, else ended by its owner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest

from autobatch.device.host import HostDevice
from autobatch.probe.ahead import begun, server_for
from autobatch.probe.job import job_of
from autobatch.probe.processes import Server
from tests.workloads import small

ISOLATION = HostDevice(memory_limit_bytes=1 << 28).isolation()
JOB = job_of(small.build, ISOLATION)


class Silent(Server):
    """Starts no process."""

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
    monkeypatch.setattr("autobatch.probe.ahead.Server", Silent)


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


def test_one_that_nobody_took_is_a_process_and_leaves_none() -> None:
    me = psutil.Process()
    with begun(ISOLATION):
        (child,) = [child for child in me.children() if "worker import serve" in " ".join(child.cmdline())]
    assert not child.is_running()
