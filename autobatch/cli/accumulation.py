"""``--effective-batch-size``: from the micro-batch that was found to the numbers that a command or a loop is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.arguments import within_effective_batch
from autobatch.probe.search.rounding import Rounding
from autobatch.training.plan import AccumulationPlan, plan_accumulation

if TYPE_CHECKING:
    from autobatch.cli.sweep import Sweep
    from autobatch.result import BatchSizeResult


def check_effective_batch(effective_batch_size: int | None, *, mode: str | None, sweep: Sweep | None) -> None:
    """Raises InvalidArgumentError where there is no one batch to train with."""
    if effective_batch_size is None:
        return
    if mode == "eval":
        allowed = "left out with --mode eval: an evaluation accumulates nothing"
        raise InvalidArgumentError("effective_batch_size", effective_batch_size, allowed)
    if sweep is not None:
        allowed = "left out with --sweep, which has an answer at each value: the plan is for one"
        raise InvalidArgumentError("effective_batch_size", effective_batch_size, allowed)


def limits(effective_batch_size: int | None, options: Mapping[str, Any], *, mode: str | None) -> dict[str, Any]:
    """What ends a search that has ``options`` at the effective batch.

    A search for evaluation too goes beyond, for that is not accumulated.

    Raises:
        InvalidArgumentError: if no permitted size is as small as the effective batch.
    """
    if effective_batch_size is None or mode == "both":
        return {}
    own = {name: options[name] for name in ("max_batch_size", "multiple_of")}
    return {"max_batch_size": within_effective_batch(effective_batch_size, **own)}


def planned(
    result: BatchSizeResult, effective_batch_size: int, options: Mapping[str, Any]
) -> tuple[BatchSizeResult, AccumulationPlan]:
    """``result`` with the plan in its environment and a note where the plan is not exact; and the plan.

    ``options`` are those of the search.
    """
    fits, ranks = result.batch_size, int(result.environment.get("ranks", 1))
    plan = plan_of_equals(effective_batch_size, fits, ranks, multiple_of=options["multiple_of"])
    known = {"effective_batch_size": effective_batch_size, "accumulation": asdict(plan)}
    notes = (*result.notes, *_notes(result, plan, effective_batch_size, options))
    return replace(result, environment={**result.environment, **known}, notes=notes), plan


def plan_of_equals(
    effective_batch_size: int, fits: int, ranks: int, *, multiple_of: int | str = "auto"
) -> AccumulationPlan:
    """The plan nearest to ``effective_batch_size`` whose micro-batches are all alike, as a command's are.

    Of the sizes that ``multiple_of`` allows, up to ``fits``, those are looked at that are more than half as large as
    can be, since smaller ones leave the device idle. Among the nearest it is the plan with the fewest steps. So 96 with
    50 fitting is 48 x 2, 102 with 30 fitting is 17 x 6, and 7 with 4 fitting is 4 x 2, which are 8.
    """
    rounding = Rounding(1 if multiple_of == "auto" else multiple_of)
    share = -(-effective_batch_size // ranks)
    most = min(fits, rounding.size(rounding.rank(share - 1) + 1))  # no more than takes the whole at once

    def pairs() -> Iterator[tuple[int, int, int]]:
        for micro in range(most, most // 2, -1):
            steps = effective_batch_size // (micro * ranks)
            if rounding.down(micro) == micro:
                for count in range(max(1, steps), steps + 2):
                    yield abs(micro * count * ranks - effective_batch_size), count, micro

    _, count, micro = min(pairs(), key=lambda pair: pair[:2])
    return plan_accumulation(effective_batch_size=micro * count * ranks, micro_batch_size=micro, world_size=ranks)


def _notes(result: BatchSizeResult, plan: AccumulationPlan, wanted: int, options: Mapping[str, Any]) -> Iterator[str]:
    if plan.effective_batch_size != wanted:
        yield _inexact(result, plan, wanted)
    if options["max_batch_size"] != wanted:
        return  # another cap, or none
    is_next = result.batch_size == Rounding("auto").down(wanted) < wanted
    if options["multiple_of"] == "auto" and is_next and plan.steps > 1:
        yield f"{wanted} is not a round size, so it was not tried as one batch: --multiple-of 1 tries it."
    if result.eval_batch_size is not None:
        yield f"For evaluation nothing above {wanted} was tried: --mode both tries it."


def _inexact(result: BatchSizeResult, plan: AccumulationPlan, wanted: int) -> str:
    """That ``wanted`` is missed, and what meets it."""
    share, rest = divmod(wanted, plan.world_size)
    ways = []
    if not rest:
        micro = next(size for size in range(min(share, result.batch_size), 0, -1) if share % size == 0)
        exact = plan_accumulation(effective_batch_size=wanted, micro_batch_size=micro, world_size=plan.world_size)
        ways.append(str(exact))
    if "command" not in result.environment:
        ways.append(f"autobatch.Accumulator(..., micro_batch_size={result.batch_size})")
    exactly = f"; exact: {' or '.join(ways)}" if ways else ""
    return f"Large micro-batches of one size do not make {wanted}: {plan} is nearest{exactly}."
