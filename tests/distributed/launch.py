"""Ranks of a gloo job: forks of a process that has imported torch, which run functions by their names."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
WITHIN_S = 120.0
COLLECTIVE_WITHIN_S = 60.0


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "tests.distributed.scenarios", "tests.distributed.probes"])
"""Imported once for all ranks of a test module; none of it starts a thread."""


def end_server() -> None:
    """Ends the process that ranks are forks of, and its helper. The next rank starts others."""
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


class Job:
    """So many ranks, which live until :meth:`close`. Arguments and results go through JSON."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
        self._ranks = [_Rank(rank, size, f"{self._folder.name}/store") for rank in range(size)]

    def run(
        self, function: Callable[..., Any], *, within_s: float = WITHIN_S, **arguments: Any
    ) -> list[dict[str, Any]]:
        """What ``function(rank, **arguments)`` gave on each rank: ``result``, or ``error`` and ``message``, or
        ``code`` of one that died. Fails if a rank is not done within ``within_s``.
        """
        asked = json.dumps([f"{function.__module__}:{function.__qualname__}", arguments])
        for rank in self._ranks:
            rank.talk.send(asked)
        until_s = time.monotonic() + within_s
        return [rank.answer(until_s) for rank in self._ranks]

    def results(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """As :meth:`run`, where every rank must have a result."""
        outcomes = self.run(function, **arguments)
        assert all("result" in outcome for outcome in outcomes), outcomes
        return [outcome["result"] for outcome in outcomes]

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()


class _Rank:
    def __init__(self, rank: int, size: int, store: str) -> None:
        self.talk, theirs = _FORKS.Pipe()
        with theirs:
            self.process = _FORKS.Process(target=_serve, args=(theirs, rank, size, store))
            self.process.start()

    def answer(self, until_s: float) -> dict[str, Any]:
        assert self.talk.poll(max(0.0, until_s - time.monotonic())), "a rank hangs"
        try:
            found: dict[str, Any] = json.loads(self.talk.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            return {"code": self.process.exitcode}
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.talk.close()


def _serve(talk: Connection, rank: int, size: int, store: str) -> None:
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_WITHIN_S),
    )
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = json.loads(talk.recv())
            module, _, function = name.partition(":")
            try:
                said = {"result": getattr(importlib.import_module(module), function)(rank, **arguments)}
            except Exception as exc:  # noqa: BLE001 - the test looks at it
                said = {"error": type(exc).__name__, "message": str(exc)}
            talk.send(json.dumps(said))
    # The group is not destroyed: that would wait for ranks that are gone.
    os._exit(0)
