"""One optimizer step of any number of samples, with the gradients of the whole batch.

Each micro-batch's loss is weighed by its share of the loss terms of the *window*, all the samples of the optimizer
step on all ranks, never averaged over micro-batches: those may have fewer terms than others. A window that runs out of
memory is undone and repeated in smaller micro-batches.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autobatch.device.oom import Tier, classify, first_line
from autobatch.errors import AutobatchWarning, DoesNotFitError, InvalidArgumentError
from autobatch.probe.search.arguments import check_count
from autobatch.probe.workload.arguments import check_functions, check_model, check_options
from autobatch.training.passes import Passes
from autobatch.training.recovery import OnRecovery
from autobatch.training.runner import Runner
from autobatch.training.together import Together
from autobatch.training.update import Update
from autobatch.training.window import Window

if TYPE_CHECKING:
    from autobatch.training.noise import NoiseScale

REDUCTIONS = ("mean", "sum")


class Accumulator:
    """Trains on batches of any size in micro-batches that fit.

    ::

        accumulator = autobatch.Accumulator(model, optimizer, loss_fn, micro_batch_size=result.batch_size)
        for batch in loader:           # each as large as an optimizer step should be
            accumulator.step(batch)    # in the place of forward, backward and optimizer.step()

    The gradient is that of the whole batch, to rounding: for a ``loss_fn`` that is a mean over terms each micro-batch
    counts by its terms, for a sum it counts as it is. Two things do not decompose and differ: batch norm takes its
    statistics from a micro-batch (which is warned of once), and so does a loss that compares samples with each other.

    Among the ranks of a torch.distributed job each gives :meth:`step` samples of its own, as many as it likes, and all
    of them together are the window. The model may be plain (its weights are made those of rank 0), in
    DistributedDataParallel, or sharded by FSDP2 (``fully_shard``). If one rank runs out of memory, all repeat the
    window in halved micro-batches. A sharded model, or one with synchronised batch norm, runs collectives amid
    forward: there running out of memory ends the run.

    Args:
        model: what is trained.
        optimizer: one, or several that are stepped one after the other.
        loss_fn: ``loss_fn(output, target)`` for batches that are a pair, else ``loss_fn(output, batch)``. Without it
            the model returns the loss itself, as in :class:`~autobatch.Workload`.
        micro_batch_size: the most samples that are run at once, such as the ``batch_size`` that ``find`` answered.
        count: ``count(batch)`` is the number of terms that the loss is a mean over; samples if not given. For a model
            of transformers that shifts its labels, ``lambda batch: (batch["labels"][:, 1:] != -100).sum()``; for a loss
            with class weights ``lambda batch: weights[batch[1]].sum()``, for it is a mean over those.
        reduction: what ``loss_fn`` does over the terms: ``"mean"`` or ``"sum"``.
        precision: ``"bf16"`` or ``"fp16"`` for autocast; fp16 needs a ``scaler``.
        scaler: the GradScaler, which scales the losses and steps the optimizers.
        scheduler: stepped once after each step of the optimizers.
        max_grad_norm: gradients are clipped to this norm before the step.
        noise: a :class:`~autobatch.NoiseScale`, which looks at the gradients of each micro-batch.
        grow_after: after so many windows without running out of memory a micro-batch that was halved is doubled, up to
            ``micro_batch_size``; None keeps it small.
        on_recovery: called with a :class:`~autobatch.training.recovery.Recovery` before a window is repeated.

    Raises:
        InvalidArgumentError: an argument is wrong.
        RankError: the gradients of several ranks cannot be brought together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        micro_batch_size: int,
        count: Callable[[Any], Any] | None = None,
        reduction: str = "mean",
        precision: str | None = None,
        scaler: Any = None,
        scheduler: Any = None,
        max_grad_norm: float | None = None,
        noise: NoiseScale | None = None,
        grow_after: int | None = None,
        on_recovery: OnRecovery | None = None,
    ) -> None:
        optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        _check_objects(model, optimizers or [None], scheduler, scaler, noise)
        check_functions(loss_fn=loss_fn, count=count, on_recovery=on_recovery)
        check_options(precision=precision, max_grad_norm=max_grad_norm)
        _check_choices(micro_batch_size, grow_after, reduction, precision, scaler)
        _check_its_own(model, loss_fn, optimizers)
        self.model, self._noise, self._reduction = model, noise, reduction
        self._together = Together(model, loss_fn)
        self._update = Update(model, optimizers, scaler=scaler, scheduler=scheduler, max_grad_norm=max_grad_norm)
        self._passes = Passes(
            self._together.module,
            loss_fn,
            count=count,
            reduction=reduction,
            precision=precision,
            noise=noise,
            runs_all=self._together.talks_in_forward,
            factor=float(self._together.ranks.size) if self._together.is_sharded else 1.0,
        )
        self._runner = Runner(
            self._passes,
            self._update,
            self._together,
            micro_batch_size=micro_batch_size,
            grow_after=grow_after,
            on_recovery=on_recovery,
        )
        self.watch()

    @property
    def micro_batch_size(self) -> int:
        """The most samples that are run at once: halved where memory runs out."""
        return self._runner.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        check_count("micro_batch_size", size)
        self._runner.micro_batch_size = size

    @property
    def windows(self) -> int:
        """How many steps are done."""
        return self._runner.windows

    def step(self, *batches: Any) -> Window:
        """Trains one step: forward and backward in micro-batches, clipping, and the optimizers.

        Args:
            batches: the samples of the step, in one batch or in several: tensors whose first dimension is the sample,
                in mappings, sequences or dataclasses as the model or ``loss_fn`` takes them; on the host or on the
                device. What is larger than a micro-batch is split. Among several ranks those of this one, which may
                have none.

        Raises:
            InvalidArgumentError: if a batch cannot be split, or the loss is not a scalar.
            DoesNotFitError: if not even one sample fits, or if memory ran out in the optimizers' step, which cannot be
                undone. In the first case model, optimizers and random numbers are as before the window.
            RankError: if another rank failed.
            Exception: what the model raises for a reason other than memory, unchanged; gradients are dropped.
        """
        started_s = time.perf_counter()
        ran = self._runner.run(batches)
        loss, norm, stepped = ran.loss, None, False
        if ran.whole.terms:
            loss = self._together.add_gradients(self._update.parameters(), loss)
            norm, stepped = self._applied(ran.whole.terms)
        else:
            warnings.warn(f"window {self.windows} has no loss term, and was skipped", AutobatchWarning, stacklevel=2)
        self._runner.done()
        return Window(
            loss=loss,
            grad_norm=norm,
            samples=ran.whole.samples,
            terms=ran.whole.terms,
            micro_batches=ran.micro_batches,
            stepped=stepped,
            duration_s=time.perf_counter() - started_s,
        )

    @property
    def stateful(self) -> tuple[Any, ...]:
        """Modules, optimizers and scaler: what :meth:`rehearse` changes."""
        return (*self._passes.modules, *self._update.stateful)

    def rehearse(self, batches: Sequence[Any]) -> None:
        """A step of this rank alone, as a probe tries it, with each of ``batches`` as a micro-batch.

        Running out of memory is an error as any other. Nothing is counted, and the scheduler stays where it is: a
        schedule ends.
        """
        parts = [self._passes.counted(batch) for batch in batches]
        terms = sum(part.terms for part in parts)
        try:
            for part in parts:
                self._passes.run([part], terms, self._update, watched=False)
            self._update.apply(schedules=False)
        finally:
            self._update.zero_grad()

    @property
    def passes(self) -> Passes:
        """Forward and backward of a micro-batch, as a step runs them."""
        return self._passes

    @property
    def module(self) -> nn.Module:
        """The model without DistributedDataParallel and torch.compile: what a checkpoint is of."""
        module: nn.Module = getattr(self._together.module, "_orig_mod", self._together.module)
        return module

    @property
    def runs_in_step(self) -> bool:
        """Whether the model runs collectives amid forward, so that every rank must come to each."""
        return self._together.talks_in_forward

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of the model only."""
        return self._together.is_sharded

    def watch(self) -> None:
        """Puts the noise scale's hooks on the parameters, if there is one. ``noise.close()`` takes them off."""
        if self._noise is not None:
            self._noise.watch(self._update.parameters())

    def agreed(self, function: Callable[[], Any]) -> list[Any]:
        """What ``function`` gives on each rank. Raises RankError where it raised on another."""
        return self._together.agreed(function)

    def restart(self, micro_batch_size: int) -> None:
        """Begins to count windows anew, with micro-batches of another size."""
        self._runner.restart(micro_batch_size)

    def state_dict(self) -> dict[str, int]:
        """What changes from window to window, beside what the model, the optimizers and their like hold."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "windows": self._runner.windows,
            "clean": self._runner.clean,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.micro_batch_size = state["micro_batch_size"]
        self._runner.windows, self._runner.clean = state["windows"], state["clean"]

    def _applied(self, terms: float) -> tuple[Tensor, bool]:
        done: list[tuple[Tensor, bool]] = []
        self._together.agreed(lambda: done.append(self._apply()))
        norm, stepped = done[0]
        if self._noise is not None and self._noise.is_due(self.windows):
            mean = norm if self._reduction == "mean" else norm / terms
            self._noise.finish(grad_norm=mean, ranks=self._together.ranks)
        return norm, stepped

    def _apply(self) -> tuple[Tensor, bool]:
        failure = None
        try:
            return self._update.apply()
        except Exception as exc:  # noqa: BLE001 - classified below
            failure = exc
        if classify(failure) is not Tier.DEFINITE:
            raise failure
        said = f"memory ran out in the optimizer's step of window {self.windows}, which cannot be undone"
        raise DoesNotFitError(f"{said}: {first_line(failure)}") from failure


def _check_objects(model: Any, optimizers: Sequence[Any], scheduler: Any, scaler: Any, noise: Any) -> None:
    for optimizer in optimizers:
        if optimizer is None:
            raise InvalidArgumentError("optimizer", optimizer, "a torch optimizer, or a list of them")
        check_model(model, optimizer, scheduler, scaler)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InvalidArgumentError(
            "scheduler", "ReduceLROnPlateau", "one that steps without a metric; step it yourself"
        )
    if noise is not None and not hasattr(noise, "micro_batch"):
        raise InvalidArgumentError("noise", noise, "an autobatch.NoiseScale, or None")


def _check_its_own(model: nn.Module, loss_fn: Any, optimizers: Sequence[Any]) -> None:
    """An optimizer that was made before the model was copied, or replaced, would train nothing."""
    modules = [model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    for optimizer in optimizers:
        theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if theirs and not theirs & own:
            said = f"{type(optimizer).__name__} of parameters that the model does not have"
            raise InvalidArgumentError("optimizer", said, "one of the model's own parameters")


def _check_choices(micro_batch_size: Any, grow_after: Any, reduction: Any, precision: str | None, scaler: Any) -> None:
    check_count("micro_batch_size", micro_batch_size)
    if grow_after is not None:
        check_count("grow_after", grow_after)
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError("reduction", reduction, f"one of {', '.join(REDUCTIONS)}")
    if precision == "fp16" and scaler is None:
        raise InvalidArgumentError("scaler", None, "a torch GradScaler with precision='fp16'")
