"""A training step that belongs to somebody else's trainer, as the probe runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from autobatch.integrations.loaders import Source
from autobatch.probe.search.within import Extent
from autobatch.probe.state import preserved
from autobatch.probe.workload import Workload
from autobatch.probe.workload.data import Batches, DatasetBatches
from autobatch.probe.workload.forward import device_of


class TrainerWorkload(Workload):
    """Runs steps of a trainer on batches that are collated as its loader collates them, from the longest samples.

    Args:
        model: what is trained, where it is trained.
        source: the samples of training.
        step: runs one optimizer step on the micro-batches it is given, which are on the host. To know what a window
            needs, two of them are enough: the gradients of the first are alive in the second.
        share: the samples of a window that are this rank's; None for no accumulation.
        holds_window: whether the trainer takes all micro-batches of a window before it runs the first.
        evaluation: the samples of each evaluation.
        evaluate: runs an evaluation of one batch on the host; the second argument is the number of its source.
        stateful: what else a step changes and must be put back.
        identity: what tells this training from others, for a cache: see :attr:`Workload.identity`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        step: Callable[[list[Any]], Any],
        *,
        share: int | None = None,
        holds_window: bool = False,
        evaluation: Sequence[Source] = (),
        evaluate: Callable[[Any, int], Any] | None = None,
        stateful: Sequence[Any] = (),
        identity: Sequence[Any] = (),
    ) -> None:
        with preserved((), str(device_of(model))):  # samples are measured, and may be drawn with random numbers
            batches = [DatasetBatches(each.dataset, each.collate_fn, None) for each in (source, *evaluation)]
        mode = "both" if evaluation else "train"
        super().__init__(model, sample=batches[0], extra_state=stateful, mode=mode)
        self.identity = (share, holds_window, *identity)
        self._step, self._share, self._holds_window = step, share, holds_window
        self._evaluations, self._evaluate_batch = batches[1:], evaluate

    def data(self) -> dict[str, Extent]:
        training = super().data()["train"]
        if self._share is not None and self._share < training.samples:
            # No micro-batch is larger than the window; an evaluation may be.
            training = Extent(samples=self._share, varies=training.varies, ends="max_batch_size")
        extents = {"train": training}
        if self._evaluations:
            # Shuffled orders are of training.
            extents["eval"] = Extent(samples=max(e.extent.samples for e in self._evaluations), varies=False)
        return extents

    def train_step(self, batch_size: int, sample: Batches | None = None) -> None:
        self.model.train()
        draw = sample or self.sample
        self._step([draw(batch_size) for _ in range(self._micro_batches(batch_size))])

    def eval_step(self, batch_size: int, sample: Batches | None = None) -> None:
        assert self._evaluate_batch is not None
        self.model.eval()
        for number, batches in enumerate(self._evaluations):
            self._evaluate_batch(batches(min(batch_size, batches.extent.samples)), number)

    def _micro_batches(self, batch_size: int) -> int:
        if self._share is None or batch_size >= self._share:
            return 1
        return -(-self._share // batch_size) if self._holds_window else 2
