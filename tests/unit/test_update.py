"""The end of a window: unscaling, clipping, and one step of all optimizers or none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch import Accumulator, DoesNotFitError
from tests.workloads.training import OUT, windows


class Bursts(torch.optim.SGD):
    """Runs out of memory in its first step."""

    burst = False

    def step(self, closure: Any = None) -> None:
        if not self.burst:
            self.burst = True
            raise OUT
        super().step(closure)


def test_clipping_schedule_and_several_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    reference = copy.deepcopy(model)
    x = torch.randn(10, 3).double()

    def optimizers(net: nn.Sequential) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net[0].parameters(), lr=0.5), torch.optim.AdamW(net[1].parameters(), lr=0.1)]

    ours, theirs = optimizers(model), optimizers(reference)
    scheduler = torch.optim.lr_scheduler.StepLR(ours[0], 1)
    accumulator = Accumulator(
        model, ours, lambda o, b: (o**2).mean(), micro_batch_size=3, scheduler=scheduler, max_grad_norm=0.01
    )
    window = accumulator.step(x)
    (reference(x) ** 2).mean().backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    for optimizer in theirs:
        optimizer.step()
    assert torch.allclose(window.grad_norm, norm)  # type: ignore[arg-type]
    assert scheduler.get_last_lr() == [0.05]
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
        assert one.grad is None


def test_a_scaler_scales_and_skips_and_holds_the_schedule() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accumulator = Accumulator(
        model, optimizer, lambda o, b: o.sum(), micro_batch_size=2, scaler=scaler, scheduler=scheduler, reduction="sum"
    )
    assert accumulator.step(torch.ones(4, 3)).stepped
    window = accumulator.step(torch.full((4, 3), float("inf")))
    assert not window.stepped
    assert scaler.get_scale() == 2.0
    assert scheduler.get_last_lr() == pytest.approx([0.01])


def test_after_an_error_in_the_optimizers_step_the_next_window_trains() -> None:
    model = nn.Linear(6, 2)
    scaler = torch.amp.GradScaler("cpu")
    accumulator = Accumulator(
        model, Bursts(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=8, scaler=scaler, max_grad_norm=1.0
    )
    with pytest.raises(DoesNotFitError, match="memory ran out in the optimizer's step of window 0"):
        accumulator.step(windows(1)[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert accumulator.step(windows(1)[0]).stepped


def test_several_optimizers_step_together_or_not_at_all() -> None:
    first, second, idle = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)
    model = nn.ModuleList([first, second, idle])
    model.forward = lambda x: first(x).sum() + (second(x) * float("inf")).sum()  # type: ignore[method-assign]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in model]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = first.weight.clone()
    accumulator = Accumulator(
        model, optimizers, lambda o, b: o, micro_batch_size=8, scaler=scaler, max_grad_norm=1.0, reduction="sum"
    )
    assert not accumulator.step(torch.ones(8, 6)).stepped
    assert torch.equal(first.weight, before)
    assert scaler.get_scale() == 4.0


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    def trained(**options: Any) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        window = Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=5, max_grad_norm=0.5, **options).step(
            (torch.ones(8, 6), torch.zeros(8, 2))
        )
        return model.weight.detach(), window.grad_norm

    plain, scaled = trained(), trained(scaler=torch.amp.GradScaler("cpu"))
    assert torch.allclose(plain[0], scaled[0])
    assert plain[1] is not None
    assert scaled[1] is not None
    assert torch.allclose(plain[1], scaled[1])


def test_a_losss_own_parameters_are_clipped_with_the_models() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (1000 * self.weight * (output - target)).mean()

    model, loss = nn.Linear(6, 2), Weighted()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=1.0)
    Accumulator(model, optimizer, loss, micro_batch_size=8, max_grad_norm=1e-3).step(
        (torch.ones(8, 6), -torch.ones(8, 2))
    )
    assert abs(loss.weight.item() - 1.0) <= 1e-3
