"""From a trainer's step to the numbers it is given: the largest micro-batch, and as many steps as make the batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from autobatch.errors import AutobatchWarning, InvalidArgumentError, UnsupportedTrainerError
from autobatch.probe.finder import find
from autobatch.probe.search.arguments import check_count
from autobatch.probe.search.rounding import Rounding
from autobatch.probe.workload import Workload
from autobatch.probe.workload.data import DatasetBatches
from autobatch.result import BatchSizeResult
from autobatch.training.plan import AccumulationPlan, plan_accumulation

WHOLE_COMMAND = (
    "one rank that runs out of memory there leaves the others waiting. `autobatch probe -- COMMAND` tries the command "
    "that starts all ranks, with {batch_size} where its batch size is written"
)
"""What to do where ranks act together. The braces are for the user to type."""

PLAN_NOTE = "An optimizer step is"
NO_DIVISOR = "has no divisor near"
"""How notes about a plan are told from others, where another plan takes its place."""

_OURS = frozenset({"workload", "device", "state", "isolate", "per_rank"})
"""Arguments of find() that a trainer answers by itself."""


def check_options(effective_batch_size: int | None, find_options: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError for an argument of tune() that is wrong by itself."""
    if effective_batch_size is not None:
        check_count("effective_batch_size", effective_batch_size)
    known = sorted(set(inspect.signature(find).parameters) - _OURS)
    for name, value in find_options.items():
        if name not in known:
            raise InvalidArgumentError(name, value, f"left out: of autobatch.find a trainer takes {', '.join(known)}")


def share_of(effective_batch_size: int | None, world_size: int) -> int | None:
    """The samples of a rank in an optimizer step; None without accumulation.

    Raises:
        UnsupportedTrainerError: if the ranks cannot have equal shares: other libraries give each the same.
    """
    if effective_batch_size is None:
        return None
    share, rest = divmod(effective_batch_size, world_size)
    if rest or not share:
        nearest = [count * world_size for count in (share, share + 1) if count]
        raise UnsupportedTrainerError(
            f"effective_batch_size={effective_batch_size}: must be a multiple of {world_size}, the ranks, which take "
            f"equal shares; nearest: {' or '.join(map(str, nearest))}"
        )
    return share


def exact_plan(effective_batch_size: int | None, fits: int, world_size: int) -> AccumulationPlan:
    """The plan with the fewest steps whose micro-batches are all alike, as other libraries run them, and exact."""
    if effective_batch_size is None:
        return plan_accumulation(effective_batch_size=None, micro_batch_size=fits, world_size=world_size)
    share = effective_batch_size // world_size
    micro = next(size for size in range(min(fits, share), 0, -1) if share % size == 0)
    return plan_accumulation(effective_batch_size=effective_batch_size, micro_batch_size=micro, world_size=world_size)


def searched(
    workload: Workload,
    *,
    effective_batch_size: int | None,
    world_size: int,
    find_options: Mapping[str, Any],
    plan_of: Callable[[int], AccumulationPlan] | None = None,
) -> tuple[BatchSizeResult, AccumulationPlan]:
    """The largest micro-batch of ``workload`` where it is, and the plan that makes the effective batch of it.

    The result has the plan in its environment, and in its notes. ``plan_of`` makes it of the samples that fit, where it
    is not to be :func:`exact_plan`.

    Raises:
        UnsupportedTrainerError: for a step that runs collectives.
        DoesNotFitError: not even one sample fits.
    """
    share = None if effective_batch_size is None else effective_batch_size // world_size
    if share is not None and Rounding().down(share) != share:
        find_options = {"multiple_of": 1, **find_options}  # a round number would be less than a window that fits
    try:
        result = find(workload, device=str(workload.device), **find_options)
    except InvalidArgumentError as exc:
        if exc.argument != "workload":
            raise
        raise UnsupportedTrainerError(
            f"a rank cannot try the trainer's step by itself, for it has {exc.value}: {WHOLE_COMMAND}"
        ) from exc
    make_plan = plan_of or (lambda fits: exact_plan(effective_batch_size, fits, world_size))
    plan = make_plan(result.batch_size)
    known = {"effective_batch_size": plan.effective_batch_size, "accumulation": asdict(plan)}
    notes = [f"{PLAN_NOTE} {plan}."]
    most = min(result.batch_size, plan.effective_batch_size // world_size)
    if plan_of is None and plan.micro_batch_size * 2 < most:
        notes.append(
            f"{plan.effective_batch_size} {NO_DIVISOR} {result.batch_size}, which fit: micro-batches of "
            f"{plan.micro_batch_size} leave most of the device unused."
        )
    samples = _samples(workload)
    if samples is not None and samples < plan.effective_batch_size:
        notes.append(
            f"The data set has {samples} samples, fewer than an optimizer step of {plan.effective_batch_size}: a step "
            "takes what an epoch has."
        )
    for note in notes[1:]:
        warnings.warn(note, AutobatchWarning, stacklevel=4)
    environment = {**result.environment, **known}
    return replace(result, environment=environment, notes=(*result.notes, *notes)), plan


def _samples(workload: Workload) -> int | None:
    """How many samples there are to train on; None where that is not known."""
    return workload.sample.extent.samples if isinstance(workload.sample, DatasetBatches) else None
