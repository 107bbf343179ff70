"""Learning rates are scaled by the rule that the optimizer has, or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from autobatch import InvalidArgumentError, scale_lr

Make = Callable[[Any], Any]
SIZES = st.integers(1, 10**6)


def optimizer_of(kind: Any = torch.optim.SGD, **options: Any) -> Any:
    return kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("name", "factor"),
    [("SGD", 4.0), ("Adam", 2.0), ("AdamW", 2.0), ("NAdam", 2.0), ("RAdam", 2.0), ("Adamax", 2.0)],
)
def test_each_optimizer_has_its_rule(name: str, factor: float) -> None:
    kind = getattr(torch.optim, name)
    for one in (kind, type("OfSomebodyElse", (kind,), {})):
        optimizer = optimizer_of(one)
        others = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("lr", "params")}
        assert scale_lr(optimizer, 256, 1024) == factor
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor)
        assert optimizer.param_groups[0].items() >= others.items(), "betas and eps stay"


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "Adafactor", "SparseAdam"])
def test_other_optimizers_are_refused_by_name_and_follow_a_rule_that_is_given(name: str) -> None:
    optimizer = optimizer_of(getattr(torch.optim, name))
    with pytest.raises(InvalidArgumentError, match=f"optimizer='{name}'.* give rule='linear' or rule='sqrt'"):
        scale_lr(optimizer, 256, 1024)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scale_lr(optimizer, 256, 1024, rule="sqrt") == 2.0
    assert scale_lr(optimizer, 256, 1024, rule="linear") == 4.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.8)


def test_a_rule_that_is_given_goes_before_the_optimizers_own() -> None:
    assert scale_lr(optimizer_of(torch.optim.AdamW), 256, 1024, rule="linear") == 4.0
    assert scale_lr(optimizer_of(torch.optim.SGD), 256, 1024, rule="sqrt") == 2.0


@given(reference=SIZES, new=SIZES, noise=st.floats(0, 1e9), rule=st.sampled_from(["linear", "sqrt"]))
def test_the_noise_scale_caps_what_a_larger_batch_gets(reference: int, new: int, noise: float, rule: str) -> None:
    plain = scale_lr(optimizer_of(), reference, new, rule=rule)
    capped = scale_lr(optimizer_of(), reference, new, rule=rule, noise_scale=noise)
    assert plain == pytest.approx((new / reference) ** (1 if rule == "linear" else 0.5))
    ratio = new / reference
    gain = (noise / reference + 1) / (noise / (ratio * reference) + 1)
    assert capped == pytest.approx(min(plain, gain) if ratio > 1 else plain)
    assert (capped >= 1) == (ratio >= 1), "a larger batch never asks for a smaller rate"


def test_the_gain_at_its_ends() -> None:
    """All noise: the linear rule. No noise: nothing to gain. As much as the batch: (1 + 1) / (1/4 + 1)."""
    assert scale_lr(optimizer_of(), 100, 400, noise_scale=1e12) == pytest.approx(4.0)
    assert scale_lr(optimizer_of(), 100, 400, noise_scale=0) == 1.0
    assert scale_lr(optimizer_of(), 100, 400, noise_scale=100) == pytest.approx(1.6)
    assert scale_lr(optimizer_of(torch.optim.Adam), 100, 400, noise_scale=100) == pytest.approx(1.6)
    assert scale_lr(optimizer_of(torch.optim.Adam), 100, 400, noise_scale=1000) == 2.0
    assert scale_lr(optimizer_of(), 100, 400, noise_scale=None) == 4.0


@given(reference=SIZES, new=SIZES, rule=st.sampled_from(["linear", "sqrt"]))
def test_there_and_back(reference: int, new: int, rule: str) -> None:
    optimizer = optimizer_of()
    assert scale_lr(optimizer, reference, new, rule=rule) * scale_lr(optimizer, new, reference, rule=rule) == (
        pytest.approx(1.0)
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_every_group_is_scaled_and_so_is_where_a_schedule_begins() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.02)]
    groups[1]["initial_lr"] = 0.5
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scale_lr(optimizer, 10, 30)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.06])
    assert "initial_lr" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["initial_lr"] == pytest.approx(1.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[2]["lr"] == pytest.approx(3.0)


def test_tensors_are_scaled_in_place_and_once() -> None:
    """Groups that took the default have the same tensor."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    groups = [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3)]
    optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False)
    assert scale_lr(optimizer, 10, 90) == 3.0
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert float(rate) == pytest.approx(0.3)


def rates_of(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULES: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, power=2.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.LambdaLR(o, lambda step: 0.8**step)], [6]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_goes_on_as_if_its_rates_had_always_been_so(kind: str, as_tensor: bool) -> None:
    found = []
    for factor in (1, 4):
        rate = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        optimizer = optimizer_of(lr=rate, momentum=0.9)
        scheduler = SCHEDULES[kind](optimizer)
        before = rates_of(optimizer, scheduler, 4)
        if factor > 1:
            scale_lr(optimizer, 8, 8 * factor, scheduler=scheduler)
            assert float(scheduler.get_last_lr()[0]) == pytest.approx(float(optimizer.param_groups[0]["lr"]))
        found.append((before, rates_of(optimizer, scheduler, 10)))
    (before, plain), (same, scaled) = found
    assert same == before
    assert len(set(plain)) > 1, "a schedule that does not move shows nothing"
    assert scaled == pytest.approx([4 * rate for rate in plain])


def test_a_schedule_that_is_not_given_goes_back() -> None:
    """The control, and why there is an argument for it. OneCycleLR has its rates in the groups."""
    optimizer = optimizer_of()
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    scale_lr(optimizer, 1, 4)
    assert rates_of(optimizer, scheduler, 2) == pytest.approx([0.4, 0.09])
    optimizer = optimizer_of()
    scale_lr(optimizer, 1, 4)
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    assert rates_of(optimizer, scheduler, 2) == pytest.approx([0.4, 0.36])
    optimizer, other = optimizer_of(momentum=0.9), optimizer_of(momentum=0.9)
    scheduler, plain = SCHEDULES["OneCycleLR"](optimizer), SCHEDULES["OneCycleLR"](other)
    scale_lr(optimizer, 1, 4)
    expected = [4 * rate for rate in rates_of(other, plain, 10)]
    assert rates_of(optimizer, scheduler, 10) == pytest.approx(expected)


def test_floors_stay() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0.01)
    scale_lr(optimizer, 1, 4, scheduler=scheduler)
    assert rates_of(optimizer, scheduler, 6)[-1] == pytest.approx(0.01)


class Odd:
    """An optimizer of another kind, or none."""

    def __init__(self, param_groups: Any) -> None:
        self.param_groups = param_groups


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"optimizer": 3}, "optimizer"),
        ({"optimizer": Odd(3)}, "optimizer"),
        ({"optimizer": Odd([3])}, "optimizer"),
        ({"optimizer": Odd([{"params": []}]), "rule": "sqrt"}, "optimizer"),
        ({"optimizer": Odd([{"lr": None}]), "rule": "sqrt"}, "optimizer"),
        ({"optimizer": Odd([{"lr": 0.1}, {"lr": torch.tensor(1)}]), "rule": "sqrt"}, "optimizer"),
        ({"optimizer": Odd([{"lr": 0.1}])}, "optimizer"),
        ({"reference": 0}, "reference"),
        ({"reference": "256"}, "reference"),
        ({"new": -1}, "new"),
        ({"new": True}, "new"),
        ({"new": math.inf}, "new"),
        ({"new": math.nan}, "new"),
        ({"rule": "cube"}, "rule"),
        ({"noise_scale": -1}, "noise_scale"),
        ({"noise_scale": math.nan}, "noise_scale"),
        ({"noise_scale": "many"}, "noise_scale"),
        ({"scheduler": 3}, "scheduler"),
        ({"scheduler": SCHEDULES["StepLR"](optimizer_of())}, "scheduler"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(change: dict[str, Any], argument: str) -> None:
    right = {"optimizer": optimizer_of(), "reference": 256, "new": 512}
    arguments = {**right, **change}
    before = copy.deepcopy(getattr(arguments["optimizer"], "param_groups", None))
    with pytest.raises(InvalidArgumentError, match=f"^{argument}="):
        scale_lr(**arguments)
    after = getattr(arguments["optimizer"], "param_groups", None)
    assert str(after) == str(before)


def test_a_scheduler_with_a_rate_that_is_none_changes_nothing() -> None:
    optimizer = optimizer_of()
    inner: Any = SCHEDULES["StepLR"](optimizer)
    scheduler = lr_scheduler.SequentialLR(optimizer, [SCHEDULES["LambdaLR"](optimizer), inner], [3])
    inner.base_lrs = [None]
    with pytest.raises(InvalidArgumentError, match=r"^scheduler='StepLR with base_lrs=\[None\]'"):
        scale_lr(optimizer, 1, 4, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert inner.optimizer is optimizer
    assert [float(rate) for rate in scheduler._schedulers[0].base_lrs] == [0.1]


def test_a_wrapper_of_an_optimizer_and_its_scheduler() -> None:
    optimizer = optimizer_of()
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    assert scale_lr(Odd(optimizer.param_groups), 1, 4, rule="linear", scheduler=scheduler) == 4.0
    assert rates_of(optimizer, scheduler, 2) == pytest.approx([0.4, 0.36])
