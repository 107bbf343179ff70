"""A server that begins before it is asked for: taken by the search that it suits, and ended where there is none."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from autobatch.device.host import HostDevice
from autobatch.probe.ahead import begin, server_for
from autobatch.probe.job import job_of
from autobatch.probe.processes import Server
from tests.workloads import small

ISOLATION = HostDevice(memory_limit_bytes=1 << 28).isolation()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """Servers in the order of their making; no process is started."""
    made: list[Server] = []

    class Silent(Server):
        def __init__(self, *args: object) -> None:
            made.append(self)
            self.closed = 0

        def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr("autobatch.probe.ahead.Server", Silent)
    return made


def test_it_is_taken_once_and_then_another_is_made(started: list[Server]) -> None:
    ahead = begin(small.build, ISOLATION)
    taken, other = (server_for(*job_of(small.build, ISOLATION), 1.0) for _ in range(2))
    assert started == [taken, other]
    ahead.close()
    assert taken.closed == 0


def test_where_anything_else_is_to_be_tried_it_waits_and_ends_with_its_owner(started: list[Server]) -> None:
    ahead = begin(small.build, ISOLATION)
    elsewhere = replace(ISOLATION, environment={**ISOLATION.environment, "OMP_NUM_THREADS": "7"})
    server_for(*job_of(small.both, ISOLATION), 1.0)
    server_for(*job_of(small.build, elsewhere), 1.0)
    server_for(*job_of(small.build, replace(ISOLATION, memory_limit_bytes=1)), 1.0)
    assert len(started) == 4
    for _ in range(2):
        ahead.close()
    assert [server.closed for server in started] == [1, 0, 0, 0]
    assert server_for(*job_of(small.build, ISOLATION), 1.0) is started[4]


def test_what_has_no_name_for_another_process_begins_nothing(started: list[Server]) -> None:
    begin(lambda: None, ISOLATION).close()
    assert not started


def test_one_that_nobody_took_leaves_no_process() -> None:
    before = psutil.Process().children(recursive=True)
    begin(small.build, ISOLATION).close()
    assert psutil.Process().children(recursive=True) == before
