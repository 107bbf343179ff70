"""From an effective batch and the micro-batch that fits to the steps that accumulate it."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.arguments import check_count


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulationPlan:
    """How one optimizer step takes its samples. ``str`` prints the equation."""

    effective_batch_size: int
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples that a rank takes at once."""
    steps: int
    """Micro-batches of a rank in an optimizer step, alike to one sample."""
    remainder: int
    """Samples, over all ranks, that would be left for a last step if the others were full; 0 where all are alike."""
    world_size: int
    """Ranks."""

    def __str__(self) -> str:
        share, uneven = divmod(self.effective_batch_size, self.world_size)
        if uneven:
            most = _count(self.steps, "step")
            return (
                f"{self.effective_batch_size} = {self.world_size} ranks of {share} or {share + 1} samples, "
                f"each in at most {most} of at most {self.micro_batch_size}"
            )
        terms = self._terms(share)
        if self.world_size == 1:
            return f"{self.effective_batch_size} = {terms}"
        terms = f"({terms})" if " + " in terms else terms
        return f"{self.effective_batch_size} = {terms} x {self.world_size} ranks"

    def _terms(self, samples: int) -> str:
        """A rank's samples in micro-batches that are alike to one sample, as they are run."""
        small, larger = divmod(samples, self.steps)
        counts = {small + 1: larger, small: self.steps - larger}
        return " + ".join(
            f"{_count(size, 'sample')} x {_count(steps, 'step')}" for size, steps in counts.items() if size and steps
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def plan_accumulation(
    *, effective_batch_size: int | None, micro_batch_size: int, world_size: int = 1
) -> AccumulationPlan:
    """The plan with the fewest micro-batches of at most ``micro_batch_size`` samples that takes every sample once.

    Of the micro-batches that need no more steps the smallest is taken: so a divisor is preferred (96 with 50 fitting is
    48 x 2), and where there is none, the last step is hardly smaller than the others.

    Args:
        effective_batch_size: samples of an optimizer step over all ranks; None for no accumulation, which is one
            micro-batch a rank.
        micro_batch_size: the most samples that fit on a rank at once.
        world_size: ranks.

    Raises:
        InvalidArgumentError: if one is no positive whole number, or if there are fewer samples than ranks.
    """
    for argument, value in (
        ("effective_batch_size", effective_batch_size),
        ("micro_batch_size", micro_batch_size),
        ("world_size", world_size),
    ):
        if argument != "effective_batch_size" or value is not None:
            check_count(argument, value)
    if effective_batch_size is None:
        effective_batch_size = micro_batch_size * world_size
    if effective_batch_size < world_size:
        allowed = f"at least {world_size}, a sample for each of the ranks"
        raise InvalidArgumentError("effective_batch_size", effective_batch_size, allowed)
    steps = -(-effective_batch_size // (micro_batch_size * world_size))
    micro = -(-effective_batch_size // (steps * world_size))
    # Rounding up may have made a step too many: 9 samples of at most 4 are 3 x 3, and 10 on 4 ranks are 3 and 2.
    remainder = effective_batch_size - micro * world_size * (steps - 1)
    return AccumulationPlan(
        effective_batch_size=effective_batch_size,
        micro_batch_size=micro,
        steps=steps,
        remainder=0 if remainder == micro * world_size else remainder,
        world_size=world_size,
    )
