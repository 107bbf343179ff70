"""A server of trials that imports torch before it is asked for anything, beside whatever its prober does first.

Of the user's nothing runs in it until a search takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autobatch.device.base import Isolation
from autobatch.probe.job import beginning
from autobatch.probe.processes import Server
from autobatch.probe.worker import Job

_waiting: list[Server] = []


@contextlib.contextmanager
def begun(isolation: Isolation) -> Iterator[None]:
    """Inside, a server is there or soon, for the first search that needs one like it. It ends on leaving if none did.

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


def server_for(job: Job, isolation: Isolation, answer_within_s: float) -> Server:
    """A server with that job: one that was begun in the same environment, else a new one."""
    environment, paths = beginning(isolation)
    begun_ahead = (server for server in _waiting if (server.environment, server.paths) == (environment, paths))
    server = next(begun_ahead, None)
    if server is None:
        server = Server(environment, paths)
    else:
        _waiting.remove(server)
    server.give(job, answer_within_s)
    return server
