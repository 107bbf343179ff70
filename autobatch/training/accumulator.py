"""One optimizer step of any number of samples, with the gradients of the whole batch.

Each micro-batch's loss is weighed by its share of the loss terms of the *window*, all the samples of the optimizer
step, never averaged over micro-batches: those may have fewer terms than others. A window that runs out of memory is
undone and repeated in smaller micro-batches.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.device.oom import Tier, classify, first_line
from autobatch.errors import AutobatchWarning, DeviceCorruptedError, DoesNotFitError, InvalidArgumentError, RankError
from autobatch.probe.batch import move, tensors
from autobatch.probe.forward import forward
from autobatch.probe.search_arguments import check_count
from autobatch.probe.workload_arguments import check_functions, check_model, check_options
from autobatch.training.recovery import OnRecovery, Recovery, Snapshot, forget
from autobatch.training.split import micro_batches, samples_of
from autobatch.training.update import Update
from autobatch.training.window import Window

REDUCTIONS = ("mean", "sum")
_RECOVERED = frozenset({Tier.DEFINITE, Tier.SUSPECT, Tier.LIMIT})


class Accumulator:
    """Trains on batches of any size in micro-batches that fit.

    ::

        accumulator = autobatch.Accumulator(model, optimizer, loss_fn, micro_batch_size=result.batch_size)
        for batch in loader:           # each as large as an optimizer step should be
            accumulator.step(batch)    # in the place of forward, backward and optimizer.step()

    The gradient is that of the whole batch, to rounding: for a ``loss_fn`` that is a mean over terms each micro-batch
    counts by its terms, for a sum it counts as it is. Two things do not decompose and differ: batch norm takes its
    statistics from a micro-batch (which is warned of once), and so does a loss that compares samples with each other.

    Args:
        model: what is trained.
        optimizer: one, or several that are stepped one after the other.
        loss_fn: ``loss_fn(output, target)`` for batches that are a pair, else ``loss_fn(output, batch)``. Without it
            the model returns the loss itself, as in :class:`~autobatch.Workload`.
        micro_batch_size: the most samples that are run at once, such as the ``batch_size`` that ``find`` answered.
        count: ``count(batch)`` is the number of terms that the loss is a mean over; samples if not given. For a model
            of transformers that shifts its labels, ``lambda batch: (batch["labels"][:, 1:] != -100).sum()``.
        reduction: what ``loss_fn`` does over the terms: ``"mean"`` or ``"sum"``.
        precision: ``"bf16"`` or ``"fp16"`` for autocast; fp16 needs a ``scaler``.
        scaler: the GradScaler, which scales the losses and steps the optimizers.
        scheduler: stepped once after each step of the optimizers.
        max_grad_norm: gradients are clipped to this norm before the step.
        grow_after: after so many windows without running out of memory a micro-batch that was halved is doubled, up to
            ``micro_batch_size``; None keeps it small.
        on_recovery: called with a :class:`~autobatch.training.recovery.Recovery` before a window is repeated.

    Raises:
        InvalidArgumentError: an argument is wrong.
        RankError: in one of several ranks, whose gradients this does not bring together.
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
        grow_after: int | None = None,
        on_recovery: OnRecovery | None = None,
    ) -> None:
        optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        for one in optimizers or [None]:
            if one is None:
                raise InvalidArgumentError("optimizer", optimizer, "a torch optimizer, or a list of them")
            check_model(model, one, scheduler, scaler)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InvalidArgumentError(
                "scheduler", "ReduceLROnPlateau", "one that steps without a metric; step it yourself"
            )
        check_functions(loss_fn=loss_fn, count=count, on_recovery=on_recovery)
        check_options(precision=precision, max_grad_norm=max_grad_norm)
        check_count("micro_batch_size", micro_batch_size)
        if grow_after is not None:
            check_count("grow_after", grow_after)
        if reduction not in REDUCTIONS:
            raise InvalidArgumentError("reduction", reduction, f"one of {', '.join(REDUCTIONS)}")
        if precision == "fp16" and scaler is None:
            raise InvalidArgumentError("scaler", None, "a torch GradScaler with precision='fp16'")
        _check_alone()
        self.model, self._loss_fn, self._count, self._reduction = model, loss_fn, count, reduction
        self._precision, self._grow_after, self._on_recovery = precision, grow_after, on_recovery
        self._update = Update(model, optimizers, scaler=scaler, scheduler=scheduler, max_grad_norm=max_grad_norm)
        self.micro_batch_size = self._most = micro_batch_size
        self.windows = 0
        self._clean, self._has_warned = 0, False

    def step(self, batch: Any) -> Window:
        """Trains one step on ``batch``: forward and backward in micro-batches, clipping, and the optimizers.

        Args:
            batch: tensors whose first dimension is the sample, in mappings, sequences or dataclasses as the model or
                ``loss_fn`` takes them; on the host or on the device.

        Raises:
            InvalidArgumentError: if ``batch`` cannot be split, or the loss is not a scalar.
            DoesNotFitError: if not even one sample fits, or if memory ran out in the optimizers' step, which cannot be
                undone. In the first case model, optimizers and random numbers are as before the window.
            Exception: what the model raises for a reason other than memory, unchanged; gradients are dropped.
        """
        started_s = time.perf_counter()
        samples, ran, most = samples_of(batch), None, self.micro_batch_size
        snapshot = self._snapshot()
        try:
            while ran is None:
                self._update.zero_grad()
                ran = self._attempt(batch, samples, snapshot)
        except BaseException:
            self._update.zero_grad()
            self.micro_batch_size = most  # a window that is given up says nothing of the next
            raise
        window = self._finished(*ran, samples, started_s)
        self.windows += 1
        self._grow()
        return window

    def _snapshot(self) -> Snapshot:
        failure = None
        try:
            return Snapshot(self._modules(), self._device())
        except Exception as exc:  # noqa: BLE001 - classified below
            failure = exc
        if classify(failure) is not Tier.DEFINITE:
            raise failure
        forget(failure, self._device())  # what is cached may be enough
        return Snapshot(self._modules(), self._device())

    def _attempt(self, batch: Any, samples: int, snapshot: Snapshot) -> tuple[Tensor, list[float]] | None:
        """The window's loss and the terms of its parts, with the gradients accumulated. None if memory ran out and less
        is to be tried.
        """
        failure: BaseException | None = None
        try:
            return self._run(list(micro_batches(batch, samples, self.micro_batch_size)))
        except Exception as exc:  # noqa: BLE001 - classified below: what is not memory is raised unchanged
            failure = exc
        tier, message = classify(failure), first_line(failure)
        size = -(-samples // -(-samples // self.micro_batch_size))
        try:
            if tier is Tier.FATAL:
                raise DeviceCorruptedError(f"in window {self.windows}: {message}") from failure
            if tier not in _RECOVERED:
                raise failure
            self._update.zero_grad()
            forget(failure, self._device())
            snapshot.restore()
            if size == 1 and tier is Tier.SUSPECT:
                raise failure  # smaller is what could have told that it meant memory
        finally:
            del failure  # with its traceback it would keep this frame alive, and the batch
        if size == 1:
            raise DoesNotFitError(f"in window {self.windows} not even one sample fits: {message}")
        self._halve(size, message)
        return None

    def _run(self, parts: list[Any]) -> tuple[Tensor, list[float]]:
        terms = [self._terms(part) for part in parts]
        self._warn_of_batch_norm(len(parts))
        total = torch.zeros((), device=self._device())
        for part, count in zip(parts, terms, strict=True):
            if not count:
                continue  # the mean over nothing is not a number
            loss = self._loss(part)
            if self._reduction == "mean":
                loss = loss * (count / sum(terms))
            self._update.backward(loss)
            total = total + loss.detach()
        return total, terms

    def _loss(self, part: Any) -> Tensor:
        device = self._device()
        part = move(part, device)
        if _is_compiled(self.model):
            _mark_dynamic(part)
        _, loss = forward(self.model, self._loss_fn, part, precision=self._precision, device=device)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidArgumentError("loss_fn", f"a function that returns {what}", "one that returns a scalar tensor")
        return loss

    def _finished(self, loss: Tensor, terms: list[float], samples: int, started_s: float) -> Window:
        norm, stepped = None, False
        if sum(terms):
            norm, stepped = self._applied()
        else:
            warnings.warn(f"window {self.windows} has no loss term, and was skipped", AutobatchWarning, stacklevel=3)
        return Window(
            loss=loss,
            grad_norm=norm,
            samples=samples,
            terms=sum(terms),
            micro_batches=len(terms),
            stepped=stepped,
            duration_s=time.perf_counter() - started_s,
        )

    def _applied(self) -> tuple[Tensor, bool]:
        failure = None
        try:
            return self._update.apply()
        except Exception as exc:  # noqa: BLE001 - classified below
            failure = exc
        if classify(failure) is not Tier.DEFINITE:
            raise failure
        said = f"memory ran out in the optimizer's step of window {self.windows}, which cannot be undone"
        raise DoesNotFitError(f"{said}: {first_line(failure)}") from failure

    def _terms(self, part: Any) -> float:
        if self._count is None:
            return samples_of(part)
        terms = float(self._count(part))
        if not 0 <= terms < math.inf:
            raise InvalidArgumentError(
                "count", f"a function that returns {terms}", "one that returns a number from 0 on"
            )
        return terms

    def _halve(self, size: int, message: str) -> None:
        half = self.micro_batch_size // 2
        self.micro_batch_size, self._clean = half if half < size else size // 2, -1
        if self._on_recovery is not None:
            halved = self.micro_batch_size
            self._on_recovery(
                Recovery(window=self.windows, micro_batch_size=size, next_micro_batch_size=halved, message=message)
            )

    def _grow(self) -> None:
        self._clean += 1
        if self._grow_after is not None and self._clean >= self._grow_after and self.micro_batch_size < self._most:
            self.micro_batch_size, self._clean = min(self._most, 2 * self.micro_batch_size), 0

    def _device(self) -> torch.device:
        first = next(iter([*self.model.parameters(), *self.model.buffers()]), None)
        return torch.device("cpu") if first is None else first.device

    def _modules(self) -> Sequence[nn.Module]:
        return [self.model, *([self._loss_fn] if isinstance(self._loss_fn, nn.Module) else [])]

    def _warn_of_batch_norm(self, parts: int) -> None:
        if parts == 1 or self._has_warned:
            return
        self._has_warned = True
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                told = f"{name or type(module).__name__} takes its statistics from a micro-batch, not the whole batch"
                warnings.warn(told, AutobatchWarning, stacklevel=5)
                return


def _check_alone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise RankError(f"Accumulator trains in one process, and this is one of {ranks} ranks")


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _mark_dynamic(part: Any) -> None:
    """Lets a compiled model take micro-batches of every size without compiling anew."""
    for tensor in tensors(part):
        if tensor.dim() and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
