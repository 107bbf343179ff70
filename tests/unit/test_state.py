"""State: put back bit for bit, in place, on success, on an error and on Ctrl-C."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from autobatch.probe.state import fingerprint, preserved


class Net(nn.Module):
    """Batch norm, tied weights, a frozen parameter, a buffer that is replaced, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(x)
        self.count += 1
        return self.last(self.frozen(self.norm(self.first(x))))


def make(optimizer_class: type = torch.optim.AdamW, **options: object) -> tuple[Net, object, object]:
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_class([p for p in net.parameters() if p.requires_grad], lr=0.1, **options)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def train(net: Net, optimizer: object, scheduler: object, steps: int = 2) -> None:
    for _ in range(steps):
        x = torch.randn(4, 8) + random.random() + np.random.rand()
        net(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_everything_is_as_it_was(optimizer_class: type, options: dict[str, object], steps_before: int) -> None:
    things = make(optimizer_class, **options)
    train(*things, steps=steps_before)
    before = fingerprint(*things)
    with preserved(things, "cpu"):
        train(*things)
        assert fingerprint(*things) != before
    assert fingerprint(*things) == before


def test_the_run_goes_on_as_if_nothing_had_been() -> None:
    def run(disturbed: bool) -> list[torch.Tensor]:
        random.seed(1)
        np.random.seed(1)
        things = make()
        train(*things)
        if disturbed:
            with preserved(things, "cpu"):
                train(*things, steps=3)
        train(*things)
        return [t.clone() for t in things[0].state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_absent_optimizer_state_and_absent_gradients_stay_absent() -> None:
    net, optimizer, scheduler = make()
    with preserved((net, optimizer, scheduler), "cpu"):
        train(net, optimizer, scheduler)
        net(torch.randn(4, 8)).sum().backward()
    assert not optimizer.state
    assert all(p.grad is None for p in net.parameters())


def test_gradients_are_the_same_tensors_with_the_same_bits() -> None:
    net, optimizer, scheduler = make()
    net(torch.randn(4, 8)).sum().backward()
    grad = net.first.weight.grad
    bits = grad.clone()
    with preserved((net, optimizer, scheduler), "cpu"):
        train(net, optimizer, scheduler)
    assert net.first.weight.grad is grad
    assert torch.equal(grad, bits)


def test_identities_ties_and_modes_hold() -> None:
    net, optimizer, scheduler = make()
    weight, address = net.first.weight, net.first.weight.data_ptr()
    net.norm.eval()
    with preserved((net, optimizer, scheduler), "cpu"):
        net.train()
        net.frozen.requires_grad_(True)
        net.last.weight = nn.Parameter(torch.zeros(8, 8))
        net.first.weight.data = torch.zeros(8, 8)
    assert net.first.weight is net.last.weight is weight
    assert weight.data_ptr() == address
    assert optimizer.param_groups[0]["params"][0] is weight
    assert not net.norm.training
    assert net.training
    assert not net.frozen.weight.requires_grad
    assert net.count == 0


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_it_is_put_back_when_something_is_raised(raised: type[BaseException]) -> None:
    things = make()
    before = fingerprint(*things)

    def fail_midway() -> None:
        with preserved(things, "cpu"):
            train(*things)
            raise raised

    with pytest.raises(raised):
        fail_midway()
    assert fingerprint(*things) == before


def test_scaler_generators_and_foreign_objects_are_put_back() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.position = 3

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    scaler, generator, sampler = torch.amp.GradScaler("cpu", init_scale=8.0), torch.Generator(), Sampler()
    scaler.scale(torch.ones(()))
    numbers = np.random.default_rng(0)
    drawn = torch.Generator().set_state(generator.get_state())
    with preserved((scaler, generator, sampler, numbers), "cpu"):
        scaler.update(2.0)
        torch.rand(3, generator=generator)
        numbers.random(5)
        sampler.position = 9
    assert scaler.get_scale() == 8.0
    assert torch.equal(generator.get_state(), drawn.get_state())
    assert numbers.random() == np.random.default_rng(0).random()
    assert sampler.position == 3


def test_switches_of_torch_are_put_back() -> None:
    with preserved((), "cpu"):
        torch.backends.cudnn.benchmark = True
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
    assert not torch.backends.cudnn.benchmark
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


def test_views_that_share_memory_are_put_back_together() -> None:
    base = torch.arange(12.0)
    row, expanded = base[:4].view(2, 2).t(), torch.ones(1).expand(5)
    with preserved((row, expanded), "cpu"):
        base.zero_()
    assert torch.equal(base, torch.arange(12.0))


def test_a_model_may_hold_the_class_of_its_layers() -> None:
    net, optimizer, scheduler = make()
    net.layer_class = nn.BatchNorm1d
    before = fingerprint(net)
    with preserved([net], "cpu"):
        train(net, optimizer, scheduler)
        net.layer_class = nn.LayerNorm
    assert net.layer_class is nn.BatchNorm1d
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: [{1, 2}], lambda it: it[0].add(3)),
        (lambda: [random.Random(0)], lambda it: it[0].random()),
        (lambda: [np.random.default_rng(0)], lambda it: it[0].random()),
        (lambda: [np.random.RandomState(0)], lambda it: it[0].rand()),
        (lambda: [], lambda it: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)),
        (lambda: [], lambda it: torch.set_grad_enabled(False)),
        (lambda: [], lambda it: torch.set_default_dtype(torch.float64)),
    ],
)
def test_a_fingerprint_sees_what_is_put_back(make, change):
    """Else no test by hash could fail for it."""
    things = make()
    before = fingerprint(*things)
    with preserved(things, "cpu"):
        change(things)
        assert fingerprint(*things) != before
    assert fingerprint(*things) == before


def test_a_class_that_is_held_has_no_state_of_its_own():
    """``hasattr(torch.Tensor, "tolist")`` is true, and calling it is an error."""
    assert fingerprint([torch.Tensor, np.ndarray, nn.Linear]) == fingerprint([torch.Tensor, np.ndarray, nn.Linear])
