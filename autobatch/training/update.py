"""The end of a window: from accumulated gradients to a step of the optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from autobatch.probe.workload.scaling import forget_step


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
        # One that is switched off would still make a step depend on the gradients' being finite.
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._model, self._optimizers = model, optimizers
        self._scheduler, self._max_grad_norm = scheduler, max_grad_norm

    def zero_grad(self) -> None:
        """Drops every gradient."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._model.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """Each once: those of the model, and those of a loss function, which only an optimizer knows."""
        known = [*self._model.parameters(), *(p for optimizer in self._optimizers for p in _parameters_of(optimizer))]
        return list({id(parameter): parameter for parameter in known}.values())

    def scale(self) -> float:
        """What :meth:`backward` multiplies a loss with."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    @property
    def stateful(self) -> tuple[Any, ...]:
        """What a step changes beside the model and the scheduler."""
        return (*self._optimizers, *([] if self._scaler is None else [self._scaler]))

    def apply(self, *, schedules: bool = True) -> tuple[Tensor, bool]:
        """The norm of the gradients before clipping, and whether the optimizers took their step."""
        stepping = [optimizer for optimizer in self._optimizers if any(_gradients(_parameters_of(optimizer)))]
        try:
            norm = self._clipped(stepping)
            stepped = self._stepped(stepping, norm)
        except BaseException:
            forget_step(self._scaler)  # after an error too
            raise
        finally:
            self.zero_grad()
        if schedules and stepped and self._scheduler is not None:
            self._scheduler.step()
        return norm, stepped

    def _clipped(self, stepping: Sequence[Any]) -> Tensor:
        if self._scaler is not None:
            for optimizer in stepping:
                self._scaler.unscale_(optimizer)
        gradients = list(_gradients(self.parameters()))
        norm = nn.utils.get_total_norm([gradient for _, gradient in gradients])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # of a sharded model each rank has a part
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_([parameter for parameter, _ in gradients], self._max_grad_norm, norm)
        return norm

    def _stepped(self, stepping: Sequence[Any], norm: Tensor) -> bool:
        if self._scaler is None:
            for optimizer in stepping:
                optimizer.step()
            return True
        # The scaler would ask each optimizer for itself, and step some of them. It is one step, or none.
        # Asked so that a virtual GPU, where every answer is no, takes the step.
        stepped = not bool(norm.isinf() | norm.isnan())
        for optimizer in stepping if stepped else ():
            self._scaler.step(optimizer)
        if stepping:
            self._scaler.update()
        return stepped


def _parameters_of(optimizer: Any) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    return ((parameter, parameter.grad) for parameter in parameters if parameter.grad is not None)
