"""A server of trials that imports torch before it is asked for anything, beside whatever its prober does first.

It serves one search after another. Of the user's nothing runs in it until the first one takes it; what that has
imported is there for the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autobatch.device.base import Isolation
from autobatch.probe.processes.job import beginning
from autobatch.probe.processes.messages import Job
from autobatch.probe.processes.server import Server, WorkerSource

_waiting: list[Server] = []


class _Lease:
    """A server for one search, after which it waits for another."""

    def __init__(self, server: Server, job: Job) -> None:
        self._server, self._job = server, job
        self.ready, self.start_worker, self.wait_status = server.ready, server.start_worker, server.wait_status

    @property
    def is_host(self) -> bool:
        return self._server.is_host

    @property
    def makes_many(self) -> bool:
        return self._server.makes_many

    def close(self) -> None:
        if self._server in _waiting:
            return
        if self._server.can_take(self._job):
            _waiting.append(self._server)
        else:
            self._server.close()


@contextlib.contextmanager
def begun(isolation: Isolation) -> Iterator[None]:
    """Inside, a server is there or soon, for the searches that need one like it, one at a time. It ends on leaving, and
    sooner if it is lost; then each search has a server of its own.

    Args:
        isolation: what the device says its child needs.
    """
    server = Server(*beginning(isolation))
    try:
        _waiting.append(server)
        yield
    finally:
        if server in _waiting:
            _waiting.remove(server)
        server.close()


def server_for(job: Job, isolation: Isolation, answer_within_s: float) -> WorkerSource:
    """A server with that job: one that was begun in the same environment, else a new one."""
    environment, paths = beginning(isolation)
    alike = (one for one in _waiting if (one.environment, one.paths) == (environment, paths) and one.can_take(job))
    begun_ahead = next(alike, None)
    if begun_ahead is not None:
        _waiting.remove(begun_ahead)
    server = begun_ahead or Server(environment, paths)
    try:
        server.give(job, answer_within_s)
    except BaseException:
        server.close()
        raise
    return server if begun_ahead is None else _Lease(server, job)
