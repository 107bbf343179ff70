"""Runs a command under virtual GPUs, as if it had been started without us, and collects what it used."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autobatch.hook import REPORTS_VARIABLE, python_path
from autobatch.virtual.attach import environment, temporary_state
from autobatch.virtual.catalog import Card
from autobatch.virtual.usage import ProcessUsage, read_usage

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a command ended, and what each of its processes used."""

    exit_code: int
    """The command's own; 128 + n if signal n ended it."""
    usage: tuple[ProcessUsage, ...]
    """One for each process and card."""


def run_command(command: Sequence[str], cards: Sequence[Card]) -> RunReport:
    """Runs ``command`` with ``cards`` as its GPUs, in the foreground, and waits for its end.

    Raises:
        OSError: if the command cannot be started (not found, not executable).
        DeviceError: if the driver cannot be built.
    """
    with temporary_state(cards) as state_path, tempfile.TemporaryDirectory(dir=state_path.parent) as reports:
        hook = {REPORTS_VARIABLE: reports, "PYTHONPATH": python_path(os.environ)}
        variables = environment(state_path) | hook
        exit_code = _in_foreground(list(command), {**os.environ, **variables})
        return RunReport(exit_code=exit_code, usage=read_usage(state_path, Path(reports)))


def _in_foreground(command: list[str], variables: Mapping[str, str]) -> int:
    forwarded = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded | {signal.SIGCHLD})
    try:
        # Python ignores these two, and a child would inherit that.
        changed = [signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawnp(command[0], command, variables, setsigmask=before, setsigdef=changed)
        return _wait(pid, forwarded)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(pid: int, forwarded: set[signal.Signals]) -> int:
    status = None
    try:
        while status is None:
            # Awake at every signal and, should another thread have taken the child's, now and then.
            received = signal.sigtimedwait(forwarded | {signal.SIGCHLD}, _POLL_S)
            # One from the kernel is the terminal's and has reached the child too: it is in our process group.
            if received is not None and received.si_signo in forwarded and received.si_code <= 0:
                os.kill(pid, received.si_signo)
            status = _status_of(pid)
    finally:
        if status is None:  # we are being torn away: leave no orphan
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _status_of(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return status if ended else None
