"""Where the trials of a workload run: in this process, in forks of it, or in child processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from autobatch.device.base import Device
from autobatch.errors import InvalidArgumentError
from autobatch.probe.agreement import Agreement
from autobatch.probe.collectives import check_local
from autobatch.probe.command import Command
from autobatch.probe.command.executor import CommandExecutor
from autobatch.probe.executor import Executor, LocalExecutor
from autobatch.probe.isolation import ChildExecutor, ForkExecutor
from autobatch.probe.meeting import MeetingExecutor
from autobatch.probe.processes.fork import forks_are_safe
from autobatch.probe.processes.job import is_importable
from autobatch.probe.source import Source, builder_of, check_placed
from autobatch.probe.state import preserved
from autobatch.probe.workload import Workload
from autobatch.probe.workload.building import build


@contextmanager
def executor_of(
    source: Source, device: Device, isolate: bool | str, agreed: Agreement, together: Agreement
) -> Iterator[Executor]:
    """The place of the trials; what the caller owns is put back when it is left.

    Args:
        agreed: the ranks that have to agree on every trial; this one alone, where each has a size of its own.
        together: the ranks of the job.
    """
    if isinstance(source, Command):
        if together.ranks.are_several:
            allowed = "a Workload or a function among several ranks: a command starts its ranks by itself"
            raise InvalidArgumentError("workload", source.title, allowed)
        if isolate is False:
            raise InvalidArgumentError(
                "isolate", isolate, "True or 'auto' for a Command, which is a process of its own"
            )
        with closing(CommandExecutor(source, device)) as command:
            yield command
        return
    builder, isolation = builder_of(source), device.isolation()
    must = isolation.required or (isolate is True and not isolation.forks)
    if must and builder is None:
        raise InvalidArgumentError("workload", source, f"a function that builds it, because {isolation.reason}")
    can = isolate is not False and not isinstance(source, Workload) and is_importable(source)
    if builder is not None and (must or can):
        meets = agreed.ranks.are_several
        with closing(
            MeetingExecutor(builder, isolation, agreed) if meets else ChildExecutor(builder, isolation)
        ) as child:
            yield child
        return
    forks = isolate is not False and isolation.forks and forks_are_safe()
    if isolate is True and not forks:
        raise InvalidArgumentError("isolate", isolate, "False or 'auto' here, where a fork of this process hangs")
    with _live_executor(source, device, agreed, together, forks=forks) as live:
        yield live


@contextmanager
def _live_executor(
    source: Workload | Callable[..., Any], device: Device, agreed: Agreement, together: Agreement, *, forks: bool
) -> Iterator[Executor]:
    """Trials of what lives in this process, here or in forks of it. Only here there is something to put back."""
    if isinstance(source, Workload):
        check_placed(source, device)
    with preserved(
        source.stateful if isinstance(source, Workload) and not forks else (), device.torch_device
    ) as restore:
        device.begin()  # copies of tensors are there, and count for nothing; gradients that are kept do count
        workload = source if isinstance(source, Workload) else build(source, device.torch_device)
        if together.ranks.are_several:
            check_local(workload, stays=not forks)
        live = LocalExecutor(workload, device, restore, **({} if forks else {"agree": agreed.attempt}))
        if not forks:
            live.clear()
        with closing(ForkExecutor(live, agree=agreed.attempt) if forks else live) as executor:
            yield executor
