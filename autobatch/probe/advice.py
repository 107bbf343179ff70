"""What a result says to do, beside its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autobatch.device.host import missing_settings
from autobatch.probe.executor import LocalExecutor
from autobatch.probe.isolation import ForkExecutor
from autobatch.result import SHUFFLED, BatchSizeResult
from autobatch.units import format_bytes

_AS_STARTED = (LocalExecutor.where, ForkExecutor.where)
"""Of ``environment["trials_in"]``: places that have the malloc with which the caller's process was started."""

FRAGMENTED = 1.05
"""Reserved over allocated bytes above which expandable segments are worth a word."""


def fragmentation_notes(result: BatchSizeResult) -> tuple[str, ...]:
    """Says so if much of what the allocator holds at the answer is in no tensor: expandable segments help there."""
    if result.environment.get("kind") == "cpu":  # malloc's memory, not the caching allocator's
        return ()
    for measured in result.answer_measurements()[:1] if result.smallest_failure is not None else []:
        allocated, reserved = measured.peak_allocated_bytes, measured.peak_reserved_bytes
        if allocated and reserved and reserved > FRAGMENTED * allocated:
            return (
                f"At the answer {format_bytes(reserved)} are reserved for {format_bytes(allocated)} of tensors: "
                "PYTORCH_ALLOC_CONF=expandable_segments:True may let more fit.",
            )
    return ()


def malloc_notes(result: BatchSizeResult) -> tuple[str, ...]:
    """Says for host memory which settings of malloc the answer needs, or would be larger with, where there are none.

    A multilayer perceptron under 96 MiB, on one thread: 1728 samples ran with them, and 900 ran out without.
    """
    settings = " ".join(f"{name}={value}" for name, value in missing_settings().items())
    if result.environment.get("kind") != "cpu" or not settings:
        return ()
    if result.environment["trials_in"] in _AS_STARTED:
        return (f"More may fit in a process that is started with {settings}: its malloc gives back what is freed.",)
    return (
        f"Train with {settings} in the environment, as the trials did: without it malloc keeps much of what is freed, "
        "and less fits.",
    )


def order_notes(result: BatchSizeResult) -> tuple[str, ...]:
    """Says so if samples of different lengths were tried in so many orders and no margin covers another one.

    Of a small transformer with twelve further orders, one ran out in its eighteenth batch.
    """
    at_the_answer = [trial for trial in result.confirmation if trial.fits and trial.batch_size == result.batch_size]
    orders = sum(trial.history.startswith(SHUFFLED) for trial in at_the_answer)
    if not orders or result.headroom:
        return ()
    return (f"Samples differ in length: {orders} shuffled orders ran, and without headroom another one may not.",)


def limit_notes(limit_bytes: int | None, budget_bytes: int | None, environment: Mapping[str, Any]) -> tuple[str, ...]:
    """Says so if the caller's limit is more than there is: of a GPU it limits nothing, on the host it makes swap."""
    if limit_bytes is None:
        return ()
    free_bytes = environment.get("free_bytes")
    if environment.get("kind") == "cpu":
        if free_bytes is not None and limit_bytes > free_bytes:
            return (
                f"memory_limit={format_bytes(limit_bytes)} is more than the {format_bytes(free_bytes)} that are "
                "available: near the answer this machine may swap, or end the process.",
            )
        return ()
    if budget_bytes is not None and limit_bytes > budget_bytes:
        return (
            f"memory_limit={format_bytes(limit_bytes)} limits nothing here: the device has "
            f"{format_bytes(budget_bytes)} for this workload.",
        )
    return ()
