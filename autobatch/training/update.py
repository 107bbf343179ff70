"""The end of a window: from accumulated gradients to a step of the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Update:
    """Unscales, clips, steps and schedules, once for a window.

    Args:
        model: whose gradients are clipped, all together.
        optimizers: stepped one after the other.
        scaler: a GradScaler, or None.
        scheduler: stepped where the optimizers were, or None.
        max_grad_norm: what the norm of all gradients is clipped to, or None.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Any], *, scaler: Any, scheduler: Any, max_grad_norm: float | None
    ) -> None:
        self._model, self._optimizers, self._scaler = model, optimizers, scaler
        self._scheduler, self._max_grad_norm = scheduler, max_grad_norm

    def zero_grad(self) -> None:
        """Drops every gradient."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._model.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def apply(self) -> tuple[Tensor, bool]:
        """The norm of the gradients before clipping, and whether the optimizers took their step."""
        norm = self._clipped()
        stepped = self._stepped()
        self.zero_grad()
        if stepped and self._scheduler is not None:
            self._scheduler.step()
        return norm, stepped

    def _clipped(self) -> Tensor:
        if self._scaler is not None:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        return norm

    def _stepped(self) -> bool:
        if self._scaler is None:
            for optimizer in self._optimizers:
                optimizer.step()
            return True
        before = self._scaler.get_scale()
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return bool(self._scaler.get_scale() >= before)  # a scaler that found an inf has skipped the step, and halves
