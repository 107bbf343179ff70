"""A server of trials that imports torch before it is asked for anything, beside whatever its prober does first.

Of the user's nothing runs in it until a search takes it. It can serve one search after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autobatch.device.base import Isolation
from autobatch.probe.processes.job import beginning
from autobatch.probe.processes.server import Server
from autobatch.probe.processes.worker import Job

_waiting: list[Server] = []


class _Kept(Server):
    """A server that waits again when a search is done with it."""

    def close(self) -> None:
        if not self.can_go_on:
            self.end()
        elif self not in _waiting:
            _waiting.append(self)

    def end(self) -> None:
        super().close()


@contextlib.contextmanager
def begun(isolation: Isolation, *, many: bool = False) -> Iterator[None]:
    """Inside, a server is there or soon, for the first search that needs one like it. It ends on leaving if none did.

    Args:
        isolation: what the device says its child needs.
        many: whether it serves the searches after the first one too, and ends on leaving.
    """
    environment, paths = beginning(isolation)
    server = _Kept(environment, paths) if many else Server(environment, paths)
    try:
        _waiting.append(server)
        yield
    finally:
        is_waiting = server in _waiting
        if is_waiting:
            _waiting.remove(server)
        if isinstance(server, _Kept):
            server.end()
        elif is_waiting:
            server.close()


def server_for(job: Job, isolation: Isolation, answer_within_s: float) -> Server:
    """A server with that job: one that was begun in the same environment, else a new one."""
    environment, paths = beginning(isolation)
    alike = (one for one in _waiting if one.lives and (one.environment, one.paths) == (environment, paths))
    server = next(alike, None)
    if server is None:
        server = Server(environment, paths)
    else:
        _waiting.remove(server)
    server.give(job, answer_within_s)
    return server
