"""Which micro-batch a run trains with: the probe's answer, before the first window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from autobatch.errors import InvalidArgumentError
from autobatch.probe.finder import find
from autobatch.probe.workload import Workload
from autobatch.probe.workload.batch import move
from autobatch.probe.workload.data import batches_of
from autobatch.probe.workload.forward import forward
from autobatch.ranks import Ranks
from autobatch.result import BatchSizeResult
from autobatch.training.feed import count_samples
from autobatch.training.plan import AccumulationPlan, plan_accumulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a run takes its samples in."""

    micro_batch_sizes: tuple[int, ...]
    """Of each rank: the most samples that it runs at once."""
    eval_batch_size: int
    effective_batch_size: int
    is_probed: bool
    """Whether the micro-batch is the largest that fits."""

    @property
    def plan(self) -> AccumulationPlan | None:
        """How a window is made; None where ranks have sizes of their own."""
        if len(set(self.micro_batch_sizes)) > 1:
            return None
        return plan_accumulation(
            effective_batch_size=self.effective_batch_size,
            micro_batch_size=self.micro_batch_sizes[0],
            world_size=len(self.micro_batch_sizes),
        )

    @property
    def equation(self) -> str:
        """The plan for a person."""
        return (
            f"{self.effective_batch_size} samples over ranks of {self._each}" if self.plan is None else str(self.plan)
        )

    @property
    def _each(self) -> str:
        return ", ".join(map(str, self.micro_batch_sizes))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for; None and ``"auto"`` leave it to the run."""

    effective_batch_size: int | None
    micro_batch_size: int | Literal["auto"]
    eval_batch_size: int | None

    def check(self, ranks: Ranks) -> None:
        """Raises InvalidArgumentError where a rank would have no sample of a window."""
        if self.effective_batch_size is not None and self.effective_batch_size < ranks.size:
            allowed = f"at least {ranks.size}, a sample for each of the ranks"
            raise InvalidArgumentError("effective_batch_size", self.effective_batch_size, allowed)

    def share(self, ranks: Ranks, *, per_rank: bool) -> int | None:
        """The most samples of a rank that a window takes; None without accumulation.

        With ``per_rank`` shares go by the sizes that are still to be found.
        """
        if self.effective_batch_size is None:
            return None
        return self.effective_batch_size if per_rank else -(-self.effective_batch_size // ranks.size)

    def of(self, micro_batch_size: int, ranks: Ranks, *, found: BatchSizeResult | None = None) -> Sizes:
        """The sizes of a run whose ranks each know their own micro-batch, which the probe may have ``found``."""
        each = tuple(ranks.gather(micro_batch_size))
        of_evaluation = None if found is None else found.eval_batch_size
        return Sizes(
            micro_batch_sizes=each,
            eval_batch_size=self.eval_batch_size or of_evaluation or micro_batch_size,
            effective_batch_size=self.effective_batch_size or sum(each),
            is_probed=found is not None,
        )

    def gone_on(self, known: Mapping[str, Any], ranks: Ranks) -> Sizes | None:
        """The sizes that a run began with, and keeps, for they decide its bits; None with other ranks."""
        each = tuple(known["micro_batch_sizes"])
        effective = self.effective_batch_size or known["effective_batch_size"]
        if len(each) != ranks.size:
            return None
        of_evaluation = self.eval_batch_size or known["eval_batch_size"]
        changed = {"micro_batch_sizes": each, "effective_batch_size": effective, "eval_batch_size": of_evaluation}
        return Sizes(**{**known, **changed})


def probed(
    model: nn.Module,
    dataset: Any,
    eval_dataset: Any,
    *,
    device: str,
    loss_fn: Callable[..., Tensor] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    length: Callable[[Any], float] | Sequence[float] | None,
    share: int | None,
    training: Mapping[str, Any],
    options: Mapping[str, Any],
) -> BatchSizeResult:
    """The largest micro-batch of a rank, and that of its evaluation.

    Args:
        share: the most samples of a rank that a window takes; None for no accumulation.
        training: what else a training step has, as :class:`~autobatch.Workload` takes it.
        options: of :func:`~autobatch.find`.
    """
    evaluate = None
    if eval_dataset is not None:
        batches = batches_of(eval_dataset, collate_fn or default_collate, length if callable(length) else None)
        most = count_samples(eval_dataset)

        def evaluate(size: int) -> None:
            model.eval()
            with torch.no_grad():
                batch = move(batches(min(size, most)), torch.device(device))
                forward(model, loss_fn, batch, precision=training["precision"], device=torch.device(device))

    workload = Workload(
        model,
        loss_fn=loss_fn,
        sample=dataset,
        collate_fn=collate_fn or default_collate,
        length=length,
        evaluate=evaluate,
        accumulate=share is not None,
        mode="train" if eval_dataset is None else "both",
        **training,
    )
    given = options.get("max_batch_size")
    most_of = min(size for size in (share, given, count_samples(dataset)) if size is not None)
    return find(workload, device=device, **{**options, "max_batch_size": most_of})
