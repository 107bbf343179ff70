"""Ranks of a gloo job, each a process of its own that runs functions by their names."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
WITHIN_S = 120.0
COLLECTIVE_WITHIN_S = 60.0


class Job:
    """So many ranks, which live until :meth:`close`. Arguments and results go through JSON."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.launch", str(rank), str(size), f"{self._folder.name}/store"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def run(
        self, function: Callable[..., Any], *, within_s: float = WITHIN_S, **arguments: Any
    ) -> list[dict[str, Any]]:
        """What ``function(rank, **arguments)`` gave on each rank: ``result``, or ``error`` and ``message``, or
        ``code`` of one that died. Fails if a rank is not done within ``within_s``.
        """
        asked = json.dumps([f"{function.__module__}:{function.__qualname__}", arguments]) + "\n"
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(asked.encode())
            rank.stdin.flush()
        until_s = time.monotonic() + within_s
        return [_answer(rank, until_s) for rank in self._ranks]

    def results(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """As :meth:`run`, where every rank must have a result."""
        outcomes = self.run(function, **arguments)
        assert all("result" in outcome for outcome in outcomes), outcomes
        return [outcome["result"] for outcome in outcomes]

    def close(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
            rank.wait()
            for stream in (rank.stdin, rank.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        self._folder.cleanup()


def _answer(rank: subprocess.Popen[bytes], until_s: float) -> dict[str, Any]:
    assert rank.stdout is not None
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([rank.stdout], [], [], max(0.0, until_s - time.monotonic()))
        assert ready, "a rank hangs"
        part = os.read(rank.stdout.fileno(), 1 << 16)
        if not part:
            return {"code": rank.wait()}
        data += part
    found: dict[str, Any] = json.loads(data.splitlines()[-1])
    return found


def _serve(rank: int, size: int, store: str) -> None:
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_WITHIN_S),
    )
    for line in sys.stdin:
        name, arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            said = {"result": getattr(importlib.import_module(module), function)(rank, **arguments)}
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            said = {"error": type(exc).__name__, "message": str(exc)}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    # The group is not destroyed: that would wait for ranks that are gone.
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
