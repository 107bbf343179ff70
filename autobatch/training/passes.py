"""Forward and backward of a window's samples, one micro-batch after the other."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.errors import AutobatchWarning, InvalidArgumentError
from autobatch.probe.workload.batch import move, tensors
from autobatch.probe.workload.forward import device_of, forward
from autobatch.training.split import samples_of
from autobatch.training.update import Update

if TYPE_CHECKING:
    from autobatch.training.noise import NoiseScale


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that are run at once."""

    batch: Any
    terms: float
    """The loss terms in it; 0 where it only keeps a rank in step with the others."""


class Passes:
    """Adds the gradients of micro-batches, each weighted by its share of the window's loss terms.

    Args:
        runs_all: micro-batches without a loss term too, because other ranks wait for them.
        factor: what the gradients will be divided by, where a sharded model does that.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        *,
        count: Callable[[Any], Any] | None,
        reduction: str,
        precision: str | None,
        noise: NoiseScale | None,
        runs_all: bool,
        factor: float,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._count, self._reduction, self._precision, self._noise = count, reduction, precision, noise
        self._runs_all, self._factor, self._has_warned = runs_all, factor, False

    @property
    def device(self) -> torch.device:
        # Asked for every micro-batch: the first one is enough, and a large model has thousands.
        return device_of(self.model)

    @property
    def devices(self) -> list[torch.device]:
        """Every device that the model has parameters or buffers on."""
        found = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        return sorted(found or {self.device}, key=str)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [self.model, *([self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [])]

    def counted(self, batch: Any) -> MicroBatch:
        """``batch`` with its loss terms."""
        if self._count is None:
            return MicroBatch(batch, samples_of(batch))
        told = self._count(batch)
        if isinstance(told, Tensor) and told.numel() != 1:
            shape = f"a tensor of shape {tuple(told.shape)}"
            raise InvalidArgumentError("count", f"a function that returns {shape}", "one that returns one number")
        terms = float(told)
        if not 0 <= terms < math.inf:
            raise InvalidArgumentError(
                "count", f"a function that returns {terms}", "one that returns a number from 0 on"
            )
        return MicroBatch(batch, terms)

    def run(self, parts: Sequence[MicroBatch], terms: float, update: Update, *, watched: bool) -> Tensor:
        """What ``parts`` have of the loss of a window of ``terms`` loss terms, with their gradients added.

        ``watched`` is whether the window has other micro-batches to tell the noise from.
        """
        self._warn_of_batch_norm(len(parts))
        if self._noise is not None:
            self._noise.drop()  # what a window that was given up has told
        total = torch.zeros((), device=self.device)
        # Asking a scaler waits for the device.
        scale = update.scale() if watched else 1.0
        for part in parts:
            if not part.terms:
                if self._runs_all:
                    update.backward(self._idle(part.batch))
                continue  # the mean over nothing is not a number
            loss = self.loss(part.batch)
            if self._reduction == "mean":
                loss = loss * (part.terms / terms)
            with self._watched(part.terms, terms, scale) if watched else contextlib.nullcontext():
                update.backward(loss if self._factor == 1.0 else loss * self._factor)
            total = total + loss.detach().to(total.device)
        return total

    def _idle(self, part: Any) -> Tensor:
        """A zero that has come through the model, without a loss that may be no number."""
        output, _ = self._forward(part)
        zeros = [tensor.sum() * 0.0 for tensor in tensors(output) if tensor.requires_grad]
        return torch.stack([zero.to(self.device) for zero in zeros]).sum()

    def _watched(self, own: float, terms: float, scale: float) -> contextlib.AbstractContextManager[Any]:
        if self._noise is None or not own:
            return contextlib.nullcontext()
        # Of the gradient of the micro-batch's mean loss, which is what noise is measured of.
        share = own / terms if self._reduction == "mean" else own
        return self._noise.micro_batch(terms=own, share=share * scale)

    def is_watched(self, window: int) -> bool:
        """Whether the gradients of ``window`` are looked at."""
        return self._noise is not None and self._noise.is_due(window)

    def loss(self, part: Any) -> Tensor:
        """The loss of one micro-batch, a scalar on the model's device."""
        _, loss = self._forward(part)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidArgumentError("loss_fn", f"a function that returns {what}", "one that returns a scalar tensor")
        return loss

    def _forward(self, part: Any) -> tuple[Any, Tensor]:
        part = move(part, self.device)
        if _is_compiled(self.model):
            _mark_dynamic(part)
        return forward(self.model, self.loss_fn, part, precision=self._precision, device=self.device)

    def _warn_of_batch_norm(self, parts: int) -> None:
        if parts <= 1 or self._has_warned:
            return
        self._has_warned = True
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                told = f"{name or type(module).__name__} takes its statistics from a micro-batch, not the whole batch"
                warnings.warn(told, AutobatchWarning, stacklevel=2)
                return


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _mark_dynamic(part: Any) -> None:
    """Lets a compiled model take micro-batches of every size without compiling anew."""
    for tensor in tensors(part):
        if tensor.dim() and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
