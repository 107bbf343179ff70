"""Every error of a command becomes one line on stderr and an exit code, here and nowhere else.

==== =======================================================
0    found
1    does not fit: not even the smallest permitted batch
2    bad usage: an option, a target or a name is wrong
3    the device: not there, does not answer, or broken
4    the workload failed by itself
70   an error of autobatch's own, which is shown whole
129  terminated by SIGHUP: the terminal is gone
130  interrupted
141  nobody reads the output any more
143  terminated
==== =======================================================
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from autobatch.errors import (
    AutobatchError,
    AutobatchWarning,
    DeviceError,
    DoesNotFitError,
    InvalidArgumentError,
    MissingDependencyError,
    RankError,
    WorkloadFailedError,
)

DOES_NOT_FIT, BAD_USAGE, DEVICE_ERROR, WORKLOAD_FAILED, INTERNAL_ERROR, INTERRUPTED = 1, 2, 3, 4, 70, 130
NOBODY_READS = 128 + 13  # as a shell has it of a program that SIGPIPE ends

_SHOWN_LINES = 24
_NEEDS_TWO = "Expected more than 1 value per channel when training"  # torch/nn/functional.py, of batch norm
_TRACEBACK_KEY = "autobatch.traceback"


class Terminated(SystemExit):
    """A signal that asks the command to end, as an interrupt does. Nobody's error."""


class Failure(click.ClickException):
    """One clear line, the exit code that goes with it, and what may be shown before it."""

    def __init__(self, message: str, exit_code: int, details: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance too
        self.details = details

    def show(self, file: Any = None) -> None:
        if self.details:
            click.echo(self.details.rstrip("\n"), err=True)
        click.echo(f"Error: {self.message}", err=True)


def traceback_option(command: Any) -> Any:
    """The option ``--traceback``, for :func:`exit_codes` to find."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_TRACEBACK_KEY] = value

    return click.option(
        "--traceback",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show the whole traceback of an error.",
    )(command)


@contextlib.contextmanager
def exit_codes(ctx: click.Context) -> Iterator[None]:
    """Inside, errors end the command with their line and exit code; ``--traceback`` adds the rest."""
    with _interrupts_noted() as interrupted:
        try:
            with _coded(ctx):
                yield
        except Exception as exc:
            # An interrupt amid an import may come out as any error: numpy makes an ImportError of it.
            if interrupted and not isinstance(exc, click.exceptions.Exit):
                raise Failure("interrupted", INTERRUPTED, _details(ctx, exc)) from exc
            raise


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Inside, Ctrl-C is written down beside being raised, where Python's own handler would raise it."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _coded(ctx: click.Context) -> Iterator[None]:
    try:
        with _plain_warnings():
            yield
    except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, Failure):
        raise
    except click.UsageError as exc:
        where = f". See `{exc.ctx.command_path} --help`" if exc.ctx is not None else ""
        raise Failure(f"{exc.format_message().rstrip('.')}{where}", BAD_USAGE) from exc
    except click.Abort as exc:
        raise Failure("interrupted", INTERRUPTED) from exc
    except KeyboardInterrupt as exc:
        raise Failure("interrupted", INTERRUPTED, _details(ctx, exc)) from exc
    except Terminated as exc:
        raise Failure("terminated", int(str(exc.code)), _details(ctx, exc)) from exc
    except AutobatchError as exc:
        raise Failure(_line(ctx, exc), exit_code_of(exc), _details(ctx, exc)) from exc
    except click.ClickException:
        raise
    except (BrokenPipeError, SystemExit) as exc:
        if not _says_that_nobody_reads(exc):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        raise click.exceptions.Exit(NOBODY_READS) from exc
    except Exception as exc:
        whole = "".join(traceback.format_exception(exc))
        raise Failure("this is an error of autobatch itself; please report it", INTERNAL_ERROR, whole) from exc


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, a warning of autobatch's own is one line on stderr, without the place in its code."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, AutobatchWarning):
            click.echo(f"Warning: {message}", err=True)
        else:
            before(message, category, *rest, **named)

    with warnings.catch_warnings():
        warnings.simplefilter("always", AutobatchWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def workload_errors(ctx: click.Context) -> Iterator[None]:
    """Inside runs the user's code: an error that is not autobatch's own is the workload's, exit code 4."""
    try:
        yield
    except (AutobatchError, click.ClickException, click.exceptions.Exit, Terminated):
        raise
    except (Exception, SystemExit) as exc:
        if _says_that_nobody_reads(exc):
            raise
        raise Failure(_workload_line(exc), WORKLOAD_FAILED, _tail(ctx, _own_traceback(exc))) from exc


def _says_that_nobody_reads(exc: BaseException) -> bool:
    """Whether our output goes nowhere any more, as in ``autobatch ... | head``; rich makes an exit with 1 of that."""
    from autobatch.probe.processes.errors import ChildTraceback

    broken = exc.__context__ if isinstance(exc, SystemExit) else exc
    return isinstance(broken, BrokenPipeError) and not isinstance(broken.__cause__, ChildTraceback)


def _own_traceback(exc: BaseException) -> str:
    """The traceback of the process that raised ``exc``: frames of this one say nothing about the workload."""
    from autobatch.probe.processes.errors import ChildTraceback

    if isinstance(exc.__cause__, ChildTraceback):
        return exc.__cause__.text
    return "".join(traceback.format_exception(exc))


def _workload_line(exc: BaseException) -> str:
    first = next(iter(str(exc).strip().splitlines()), "")
    hint = "; `--start 2` begins with two samples" if _NEEDS_TWO in first else ""
    return f"the workload failed by itself: {type(exc).__name__}{': ' if first else ''}{first}{hint}"


def exit_code_of(exc: AutobatchError) -> int:
    """The exit code that goes with ``exc``; with another rank's error, the one of that."""
    if isinstance(exc, RankError) and isinstance(exc.__cause__, AutobatchError):
        return exit_code_of(exc.__cause__)
    for kind, code in (
        (DoesNotFitError, DOES_NOT_FIT),
        (InvalidArgumentError, BAD_USAGE),
        (MissingDependencyError, BAD_USAGE),
        (DeviceError, DEVICE_ERROR),
    ):
        if isinstance(exc, kind):
            return code
    return WORKLOAD_FAILED


def _line(ctx: click.Context, exc: AutobatchError) -> str:
    if isinstance(exc, InvalidArgumentError) and (spelling := _spelling(ctx, exc.argument)):
        value = "" if exc.value is True else f" {exc.value}"
        return f"{spelling}{value}: must be {exc.allowed}"
    if isinstance(exc, WorkloadFailedError):
        return f"the workload failed by itself: {exc}"
    return str(exc)


def _spelling(ctx: click.Context, argument: str) -> str | None:
    """How the command line writes what the library calls ``argument``; None for what is no option of the command."""
    if not isinstance(ctx.command, click.Group) or ctx.invoked_subcommand is None:
        return None
    command = ctx.command.get_command(ctx, ctx.invoked_subcommand)
    for param in command.params if command is not None else ():
        if param.name == argument:
            return param.opts[0] if isinstance(param, click.Option) else argument.upper()
    return None


def _details(ctx: click.Context, exc: BaseException) -> str:
    if isinstance(exc, WorkloadFailedError):
        return _tail(ctx, exc.traceback_text)
    return "".join(traceback.format_exception(exc)) if ctx.meta.get(_TRACEBACK_KEY) else ""


def _tail(ctx: click.Context, text: str) -> str:
    lines = text.rstrip().lstrip("\n").splitlines()
    if ctx.meta.get(_TRACEBACK_KEY) or len(lines) <= _SHOWN_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[-_SHOWN_LINES:], "(the last lines; --traceback shows all of them)"])
