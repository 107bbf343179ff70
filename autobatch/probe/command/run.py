"""One run of a command: started, watched, logged, and ended with everything that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from autobatch.hook.trial import MOST_REFUSALS
from autobatch.replay.trace import Trace, trace_of

LEAVE_WITHIN_S = 10.0
"""So long a command may take to leave once it is measured or has failed; then SIGTERM."""
TERM_WITHIN_S = 5.0
"""So long after SIGTERM; then SIGKILL."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended, and what its processes told."""

    code: int | None
    """The command's own exit code, -n if signal n ended it; None if it had to be ended."""
    silent: bool
    """Whether it was ended because it made no step for too long."""
    reports: tuple[Mapping[str, Any], ...]
    """What each process wrote (:mod:`autobatch.hook.trial`)."""
    tail: str = ""
    """Its last lines."""
    log: str = ""
    """The file that has them all."""
    traces: Mapping[int, Trace] = field(default_factory=dict)
    """What those of its processes allocated that were recorded, by their number."""


@dataclass
class TrialFolder:
    """The folder of a trial and its log, as the prober follows them."""

    folder: Path
    log: IO[bytes]
    verbose: bool = False
    _seen: dict[Path, tuple[int, Mapping[str, Any]]] = field(default_factory=dict)
    _shown: int = 0

    def __post_init__(self) -> None:
        self._shown = self.began = self.log.seek(0, os.SEEK_END)

    def update(self) -> bool:
        """Reads what is new; True if a process has told anything."""
        news = False
        for path in self.folder.glob("*.json"):
            if path.name == "request.json":
                continue
            changed_ns = path.stat().st_mtime_ns
            if path not in self._seen or self._seen[path][0] != changed_ns:
                self._seen[path] = (changed_ns, json.loads(path.read_text(encoding="utf-8")))
                news = True
        if self.verbose:
            self._show()
        return news

    @property
    def reports(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(report for _, report in self._seen.values())

    @property
    def decided(self) -> bool:
        """Whether a process has been measured, or has run out of memory."""
        return any(
            r["done"] or r.get("failure", {}).get("tier") or r.get("refusals", 0) >= MOST_REFUSALS for r in self.reports
        )

    def traces(self) -> Iterator[tuple[int, Trace]]:
        """What each process has recorded of itself (:mod:`autobatch.device.recording`)."""
        for path in self.folder.glob("*.history"):
            yield int(path.stem), trace_of(**json.loads(path.read_text(encoding="utf-8")), begins_empty=True)

    def tail(self, lines: int = 60, most_bytes: int = 1 << 16) -> str:
        with open(self.log.name, "rb") as file:
            file.seek(max(self.began, file.seek(0, os.SEEK_END) - most_bytes))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def _show(self) -> None:
        with open(self.log.name, "rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        sys.stderr.write(new.decode(errors="replace"))
        sys.stderr.flush()


def run(words: Sequence[str], variables: Mapping[str, str], trial: TrialFolder, *, step_within_s: float) -> Ending:
    """Runs ``words`` with the environment ``variables`` to its end, or to the end of our patience.

    Every process that has the start-up hook ends with this call, and with this process, whatever becomes of that.

    Raises:
        OSError: if the command cannot be started.
    """
    with _pipe(trial.folder / "alive"):
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=trial.log,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            start_new_session=True,
        )
        try:
            code, silent = _watch(process, trial, step_within_s)
        finally:
            _kill(process)
    trial.update()
    return Ending(
        code=code,
        silent=silent,
        reports=trial.reports,
        tail=trial.tail(),
        log=str(trial.log.name),
        traces=dict(trial.traces()),
    )


@contextlib.contextmanager
def _pipe(path: Path) -> Iterator[None]:
    """A named pipe with this process as its only writer: who reads from it learns when that is over.

    By name, because launchers hand no open file on to the processes that they start.
    """
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a writer must find one
    writer = os.open(path, os.O_WRONLY)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        deadline_s = time.monotonic() + TERM_WITHIN_S
        while _is_read(path) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _is_read(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # ENXIO: nobody reads
        return False
    return True


def _watch(process: subprocess.Popen[bytes], trial: TrialFolder, step_within_s: float) -> tuple[int | None, bool]:
    """Waits for the end; the exit code, None if it does not come by itself, and whether it said nothing for too long.

    What is decided may leave in peace for a while. Then it is told to, which a ``finally`` still hears of.
    """
    news_s, is_told = time.monotonic(), False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_POLL_S)
            trial.update()
            return code, False
        if trial.update():
            news_s = time.monotonic()
        quiet_s = time.monotonic() - news_s
        if not trial.decided:
            if quiet_s > step_within_s:
                return None, True
        elif quiet_s > LEAVE_WITHIN_S + TERM_WITHIN_S:
            return None, False
        elif quiet_s > LEAVE_WITHIN_S and not is_told:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            is_told = True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left: its group, and those of its descendants that made a group of their own."""
    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in left:
        with contextlib.suppress(psutil.Error):
            descendant.kill()
    process.wait()
