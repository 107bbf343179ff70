"""A server of trials that begins its imports before it is asked for anything, beside whatever its prober does first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autobatch.device.base import Isolation
from autobatch.probe.job import is_importable, job_of
from autobatch.probe.processes import ANSWER_WITHIN_S, Server
from autobatch.probe.worker import Job


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """A server until somebody takes it; None where there can be none."""

    job: Job | None = None
    environment: Mapping[str, str] | None = None
    server: Server | None = None

    def close(self) -> None:
        """Ends the server if it is still here."""
        if self in _waiting:
            _waiting.remove(self)
            if self.server is not None:
                self.server.close()


_waiting: list[Ahead] = []


def begin(builder: Callable[..., Any], isolation: Isolation) -> Ahead:
    """A server for the trials of ``builder`` that the next search of it takes, if all it has to be told is the same."""
    if not is_importable(builder):
        return Ahead()
    job, environment = job_of(builder, isolation)
    _waiting.append(ahead := Ahead(job, environment, Server(job, environment, ANSWER_WITHIN_S)))
    return ahead


def server_for(job: Job, environment: Mapping[str, str], answer_within_s: float) -> Server:
    """The server that was begun for just that, else a new one."""
    for ahead in _waiting:
        if ahead.server is not None and (ahead.job, ahead.environment) == (job, environment):
            _waiting.remove(ahead)
            return ahead.server
    return Server(job, environment, answer_within_s)
