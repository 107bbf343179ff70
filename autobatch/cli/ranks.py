"""``autobatch probe TARGET`` as one of several ranks: torchrun started it, and all of them look for one size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from autobatch.cli.errors import BAD_USAGE, Failure, exit_code_of
from autobatch.errors import AutobatchError, InvalidArgumentError, RankError

if TYPE_CHECKING:
    from autobatch.device.base import Device
    from autobatch.probe.agreement import Agreement

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Job:
    """This process among the ranks of a job, as torchrun tells it; alone without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """``name``, or of a kind of device the one with this rank's number on its machine."""
        if self.size == 1 or name not in ("auto", "cuda", "xpu"):
            return name
        from autobatch.device.local import local_names

        kind = local_names()[0].partition(":")[0] if name == "auto" else name
        return kind if kind in ("cpu", "mps") else f"{kind}:{self.local_rank}"

    def part_of(self, place: Device) -> Device:
        """``place`` for one of the ranks of this machine."""
        from autobatch.device.host import HostDevice

        return place.shared_by(self.local_size) if isinstance(place, HostDevice) else place

    def options(self, ctx: click.Context) -> dict[str, Any]:
        """What is different among several ranks, which agree without the cache."""
        by_default = ctx.get_parameter_source("cache") is click.core.ParameterSource.DEFAULT
        return {"cache": None} if self.size > 1 and by_default else {}


def present_job() -> Job:
    """The job that the environment speaks of."""
    if not all(os.environ.get(name) for name in _VARIABLES):
        return Job()
    rank, size, local_rank = (int(os.environ[name]) for name in _VARIABLES[:3])
    return Job(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) if size > 1 else Job()


def check_per_rank(*, of_command: bool, effective_batch_size: int | None, is_sweep: bool) -> None:
    """Raises InvalidArgumentError where ranks cannot have sizes of their own."""
    if of_command:
        raise InvalidArgumentError("per_rank", True, "left out with a COMMAND, whose ranks are given one number")
    if effective_batch_size is not None:
        allowed = (
            "left out with --effective-batch-size, whose plan is for ranks that are alike (autobatch.Trainer plans)"
        )
        raise InvalidArgumentError("per_rank", True, allowed)
    if is_sweep:
        raise InvalidArgumentError("per_rank", True, "left out with --sweep, whose table has one size at each value")
    if present_job().size == 1:
        raise InvalidArgumentError("per_rank", True, "used among several ranks: torchrun ... -m autobatch probe TARGET")


@contextlib.contextmanager
def in_job(ctx: click.Context, *, of_command: bool) -> Iterator[Job]:
    """Inside, all ranks are one process group; what goes wrong on one ends all, and rank 0 alone prints.

    Raises:
        UsageError: where a COMMAND is to be run, which starts its ranks by itself.
    """
    job = present_job()
    if job.size == 1:
        yield job
        return
    if of_command and not job.speaks:
        raise click.exceptions.Exit(BAD_USAGE)
    if of_command:
        raise click.UsageError(
            "a COMMAND starts its ranks by itself: `autobatch probe -- torchrun ... {batch_size}`, without torchrun "
            "around it",
            ctx,
        )
    from torch import distributed

    from autobatch.probe.agreement import Agreement
    from autobatch.ranks import Ranks

    distributed.init_process_group("gloo")
    try:
        together = Agreement(Ranks.here())
        with _said_once(job, together), together.session():
            yield job
            together.exchange("the end", None)
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _said_once(job: Job, together: Agreement) -> Iterator[None]:
    """Only rank 0 prints what all ranks know; a workload's own error is printed where it was raised."""
    if job.speaks:
        yield
        return
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    except Failure:
        raise
    except AutobatchError as exc:
        if together.is_known_to(0) or (isinstance(exc, RankError) and exc.rank is not None):
            raise click.exceptions.Exit(exit_code_of(exc)) from exc
        raise
