"""What ``autobatch probe`` was asked for: the device, shown before anything is run on it, and searches there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from autobatch.cli.accumulation import planned
from autobatch.cli.errors import workload_errors
from autobatch.cli.ranks import present_job
from autobatch.cli.targets import Target
from autobatch.imports import imports_of_a_command
from autobatch.probe.command import Command

if TYPE_CHECKING:
    from autobatch.device.base import Device
    from autobatch.result import BatchSizeResult


@dataclass(frozen=True, slots=True)
class Chosen:
    """A device by its name, and how to search there. ``options`` are those of :func:`autobatch.find`."""

    ctx: click.Context
    device: str
    any_capability: bool
    count: int
    options: dict[str, Any]
    effective_batch_size: int | None = None

    def place(self, workload: Target | Command) -> Device:
        """The device. Says which it is, who else uses it, and what will run there."""
        from rich.console import Console

        from autobatch.cli.devices import identify
        from autobatch.report.live import device_line, other_lines, say
        from autobatch.virtual.resolve import resolve_device

        limit_bytes = self.options["memory_limit"]
        place = resolve_device(
            self.device, memory_limit_bytes=limit_bytes, any_capability=self.any_capability, count=self.count
        )
        place = present_job().part_of(place)
        info = identify(place)
        lines = (device_line(info, place.torch_device), *other_lines(info), f"Target: {workload.title}")
        for line in (*lines, *_warnings(workload)):
            say(Console(), line)
        return place

    def server_ahead(self, workload: Target | Command, place: Device) -> AbstractContextManager[None]:
        """Inside, the process of the trials imports torch as this one is about to, for one search after another."""
        from autobatch.probe.processes.ahead import begun

        if isinstance(workload, Command) or present_job().size > 1:
            return nullcontext()
        return begun(place.isolation())

    def search(self, workload: Target | Command, place: Device, *, first_guess: int | None = None) -> BatchSizeResult:
        """Searches, shows each trial as it ends and what came of it."""
        from rich.console import Console

        from autobatch.cli.devices import identify
        from autobatch.report.live import closing_lines, display_for, say

        # Lines, where a command's own output comes between: it would tear a table that is drawn in place.
        is_verbose = isinstance(workload, Command) and workload.verbose
        console = Console(force_terminal=False if is_verbose else None)
        with display_for(console, identify(place)) as display:
            with imports_of_a_command():
                from autobatch.probe.finder import find  # imports torch, so the device is shown first

            with workload_errors(self.ctx):
                result = find(
                    workload, device=place, on_trial=display.on_trial, first_guess=first_guess, **self.options
                )
        plan = None
        if self.effective_batch_size is not None:
            result, plan = planned(result, self.effective_batch_size, self.options)
        said = _warnings(workload)
        shown = replace(result, notes=tuple(note for note in result.notes if note not in said))
        for line in closing_lines(shown, plan):
            say(console, line)
        return result


def _warnings(workload: Target | Command) -> tuple[str, ...]:
    return workload.warnings() if isinstance(workload, Command) else ()
