"""The command line itself: how fast it answers, what it imports, and that each failure has its line and its code."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from autobatch import __version__
from autobatch.cli import main
from autobatch.cli.errors import workload_errors
from autobatch.errors import (
    DeviceCorruptedError,
    DeviceNotFoundError,
    DoesNotFitError,
    InvalidArgumentError,
    MissingDependencyError,
    WorkloadFailedError,
)


def run(*arguments: str):
    return CliRunner().invoke(main, arguments, prog_name="autobatch")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_answers_in_a_blink():
    def spent_s() -> float:  # of the processor, so that a busy machine does not count
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        before_s = spent_s()
        assert python("-m", "autobatch", "--help").returncode == 0
        return spent_s() - before_s

    assert min(once() for _ in range(5)) < 0.3


def test_output_that_nobody_reads_ends_it_quietly_and_is_no_answer():
    """As in ``autobatch ... | head``: 1 would say that the batch does not fit."""
    command = [sys.executable, "-m", "autobatch", "devices", "--virtual"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    assert (running.wait(timeout=60), running.stderr.read()) == (141, "")
    running.stderr.close()


def test_help_needs_nothing_heavy():
    code = (
        "import sys, autobatch.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'transformers', 'numpy', 'pynvml', 'psutil'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert python("-c", code).stderr == ""


def test_python_m_is_the_same_command():
    shown = python("-m", "autobatch", "--version")
    assert (shown.returncode, shown.stdout) == (0, f"autobatch, version {__version__}\n")


@pytest.mark.parametrize("command", ["probe", "devices", "run"])
def test_every_command_has_help_with_an_example(command):
    assert command in run("--help").output
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"autobatch {command}" in shown.output.partition("\n\n")[2]


@pytest.mark.parametrize("arguments", [("nothing",), ("probe",), ("probe", "hf:gpt2", "--no-such-option")])
def test_bad_usage_is_code_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """``run`` with a command in it that raises what it is told, from the workload or from autobatch."""

    def invoke(exc: BaseException, *arguments: str, in_workload: bool = False):
        def fail(seq_len: int | None) -> None:
            if not in_workload:
                raise exc
            with workload_errors(click.get_current_context()):
                raise exc

        from autobatch.cli.errors import traceback_option

        option = click.Option(["--seq-len"], type=int)
        command = traceback_option(click.Command("fail", callback=fail, params=[option]))
        monkeypatch.setattr(main, "get_command", lambda ctx, name: command)
        return run("fail", *arguments)

    return invoke


ERRORS = [
    (DoesNotFitError("batch 1 does not fit"), 1, "batch 1 does not fit"),
    (InvalidArgumentError("seq_len", 9, "at most 8"), 2, "--seq-len 9: must be at most 8"),
    (InvalidArgumentError("loss_fn", None, "given"), 2, "loss_fn=None: must be given"),
    (MissingDependencyError("pip install it"), 2, "pip install it"),
    (DeviceNotFoundError("no device"), 3, "no device"),
    (DeviceCorruptedError("an illegal access"), 3, "an illegal access"),
    (WorkloadFailedError("KeyError: 'x'"), 4, "the workload failed by itself: KeyError: 'x'"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("exc", "code", "line"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_is_one_line_on_stderr_and_a_code(failing, exc, code, line):
    shown = failing(exc)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (code, "", f"Error: {line}\n")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_comes_out_as_another_error_is_one(monkeypatch):
    """As numpy's import does with it."""

    def fail() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr(main, "get_command", lambda ctx, name: click.Command("fail", callback=fail))
    before = signal.getsignal(signal.SIGINT)
    shown = run("fail")
    assert (shown.exit_code, shown.stderr) == (130, "Error: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_traceback_shows_the_rest(failing):
    shown = failing(DeviceNotFoundError("no device"), "--traceback")
    assert shown.exit_code == 3
    assert shown.stderr.startswith("Traceback (most recent call last)")
    assert shown.stderr.endswith("Error: no device\n")


def test_the_workloads_own_error_shows_the_end_of_its_traceback(failing, monkeypatch):
    monkeypatch.setattr("autobatch.cli.errors._SHOWN_LINES", 6)

    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("shapes (3,) and (4,)\nsecond line")
        deep(n - 1)

    try:
        deep(9)
    except ValueError as exc:
        shown, whole = failing(exc, in_workload=True), failing(exc, "--traceback", in_workload=True)
    assert shown.exit_code == whole.exit_code == 4
    assert "shapes (3,) and (4,)" in shown.stderr
    assert "--traceback" in shown.stderr
    assert shown.stderr.endswith("Error: the workload failed by itself: ValueError: shapes (3,) and (4,)\n")
    assert len(shown.stderr.splitlines()) < 10
    assert whole.stderr.startswith("Traceback (most recent call last)")


def test_the_traceback_of_a_child_process_is_its_own_not_ours(failing):
    from autobatch.probe.processes.errors import ChildTraceback

    try:
        raise KeyError("x") from ChildTraceback('  File "train.py", line 3, in step\nKeyError: x\n')
    except KeyError as exc:
        shown = failing(exc, "--traceback", in_workload=True)
    assert shown.stderr == (
        "  File \"train.py\", line 3, in step\nKeyError: x\nError: the workload failed by itself: KeyError: 'x'\n"
    )


def test_our_own_bug_is_not_blamed_on_the_workload(failing):
    shown = failing(KeyError("x"))
    assert shown.exit_code == 70
    assert "Traceback" in shown.stderr
    assert "error of autobatch itself" in shown.stderr
