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

    is_free = True

    def __init__(self, environment: Any, paths: Any) -> None:
        self.environment, self.paths = environment, paths
        self.given: list[Any] = []
        self.closed = 0
        made.append(self)

    def can_take(self, job: Any) -> bool:
        return self.is_free

    def give(self, job: Any, answer_within_s: float) -> None:
        self.given.append(job)
        if job is INTERRUPTED:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed += 1


made: list[Silent] = []
INTERRUPTED = replace(JOB, device="interrupted")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr("autobatch.probe.processes.ahead.Server", Silent)


def test_it_is_taken_with_a_job_of_whatever_kind_by_one_search_at_a_time(silent: None) -> None:
    other = replace(ISOLATION, memory_limit_bytes=1)
    with begun(ISOLATION):
        first = server_for(JOB, other, 1.0)
        assert server_for(JOB, ISOLATION, 1.0) is made[1]  # while it is taken
        first.close()
        first.close()
        again = server_for(JOB, ISOLATION, 1.0)
        assert server_for(JOB, ISOLATION, 1.0) is made[2]
        again.close()
        assert [(len(server.given), server.closed) for server in made] == [(2, 0), (1, 0), (1, 0)]
    assert [server.closed for server in made] == [1, 0, 0]  # the others are their searches' to close
    assert server_for(JOB, ISOLATION, 1.0) is made[3]


def test_one_that_cannot_go_on_is_closed_by_its_search_and_another_is_made(silent: None) -> None:
    with begun(ISOLATION):
        taken = server_for(JOB, ISOLATION, 1.0)
        made[0].is_free = False
        taken.close()
        assert made[0].closed == 1
        assert server_for(JOB, ISOLATION, 1.0) is made[1]


def test_in_another_environment_another_is_made(silent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with begun(ISOLATION):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert server_for(JOB, ISOLATION, 1.0) is made[1]
    assert [server.closed for server in made] == [1, 0]


def test_an_interrupt_leaves_none_without_an_owner(silent: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        server_for(INTERRUPTED, ISOLATION, 1.0)
    assert made[0].closed == 1


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


def test_it_serves_searches_one_after_the_other_and_ends_with_its_owner() -> None:
    with begun(ISOLATION):
        (first,) = servers()
        assert tried(small.build, 1) is Outcome.FITS
        assert tried(small.build, 10_000) is Outcome.OOM
        with pytest.raises(WorkloadFailedError, match="SIGKILL"):
            tried(partial(small.odd, Path(os.devnull)), small.KILLED)
        assert tried(small.build_on, 1) is Outcome.FITS
        assert servers() == [first]
        # Under other variables its imports could have done something else.
        other = server_for(replace(JOB, variables={"MINE": "1"}), ISOLATION, 1.0)
        assert len(servers()) == 2
        other.close()
        assert servers() == [first]
        first.kill()
        first.wait()
        assert tried(small.build, 1) is Outcome.FITS
    assert servers() == []


def test_it_is_not_used_again_once_it_could_not_import() -> None:
    with begun(ISOLATION):
        (first,) = servers()
        with pytest.raises(ImportError, match="no module for it"):
            tried(CannotBeImported(), 1)
        assert not first.is_running()


def test_a_server_that_is_gone_is_told_with_how_it_ended() -> None:
    server = server_for(JOB, ISOLATION, 60.0)
    with closing(server):
        (process,) = servers()
        server.ready()
        process.kill()
        with pytest.raises(WorkloadFailedError, match="the child process was killed by SIGKILL"):
            server.start_worker()
