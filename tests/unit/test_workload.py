"""What a step runs: batches of every shape, precision, clipping, accumulation, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from autobatch.errors import InvalidArgumentError
from autobatch.probe.workload import Workload


@dataclass
class Batch:
    x: torch.Tensor
    note: str = "kept"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class ReturnsLoss(nn.Module):
    """Takes its batch in every way and returns its loss in the way asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(3))

    def forward(self, x: Any, y: Any = None) -> Any:
        loss = ((x.x if isinstance(x, Batch) else x) * self.weight).sum()
        return {"scalar": loss, "tuple": (loss, x), "mapping": {"loss": loss}}[self.kind]


def stepped(model: nn.Module, sample: Any, **options: Any) -> bool:
    """Whether one training step changed the model's weight."""
    before = model.weight.detach().clone()
    Workload(model, torch.optim.SGD(model.parameters(), lr=1.0), sample=sample, **options).train_step(2)
    assert model.weight.grad is None
    return not torch.equal(before, model.weight)


@pytest.mark.parametrize("kind", ["scalar", "tuple", "mapping"])
@pytest.mark.parametrize(
    "sample",
    [
        lambda n: torch.ones(n, 3),
        lambda n: {"x": torch.ones(n, 3), "y": torch.ones(n)},
        lambda n: (torch.ones(n, 3), torch.ones(n)),
        lambda n: Pair(torch.ones(n, 3), torch.ones(n)),
        lambda n: Batch(torch.ones(n, 3)),
    ],
    ids=["tensor", "mapping", "tuple", "namedtuple", "dataclass"],
)
def test_models_that_return_their_loss(kind: str, sample: Any) -> None:
    assert stepped(ReturnsLoss(kind), sample)


@pytest.mark.parametrize(
    ("sample", "loss_fn"),
    [
        (lambda n: (torch.ones(n, 3), torch.zeros(n, 2)), functional.mse_loss),
        (lambda n: torch.ones(n, 3), lambda output, batch: output.sum() + batch.sum()),
    ],
    ids=["pair", "batch"],
)
def test_a_loss_function_gets_the_target_or_the_batch(sample: Any, loss_fn: Any) -> None:
    assert stepped(nn.Linear(3, 2), sample, loss_fn=loss_fn)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_and_scaler(precision: str) -> None:
    model = nn.Linear(3, 2)
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    workload = Workload(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda out, y: functional.mse_loss(out.float(), y),
        # Small, for a first scaled gradient that overflows would skip the step.
        lambda n: (torch.full((n, 3), 0.1), torch.zeros(n, 2)),
        precision=precision,
        max_grad_norm=1.0,
    )
    before = model.weight.detach().clone()
    workload.train_step(2)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert (workload.scaler is not None) == (precision == "fp16")
    assert not torch.equal(before, model.weight)


def test_gradients_are_clipped_before_the_step() -> None:
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Workload(model, optimizer, sample=lambda n: 100 * torch.ones(n, 3), loss_fn=lambda o, b: o.sum()).train_step(1)
    assert (before - model.weight).norm() > 100
    before = model.weight.detach().clone()
    Workload(
        model, optimizer, sample=lambda n: 100 * torch.ones(n, 3), loss_fn=lambda o, b: o.sum(), max_grad_norm=1.0
    ).train_step(1)
    assert (before - model.weight).norm().item() == pytest.approx(1.0, abs=1e-4)


def test_accumulation_runs_two_micro_batches_with_the_first_one_s_gradients_alive() -> None:
    model, had_grad = nn.Linear(3, 1), []
    model.register_forward_pre_hook(lambda m, i: had_grad.append(m.weight.grad is not None))
    sizes: list[int] = []

    def sample(n: int) -> torch.Tensor:
        sizes.append(n)
        return torch.ones(n, 3)

    Workload(model, sample=sample, loss_fn=lambda o, b: o.sum(), accumulate=True).train_step(5)
    assert sizes == [5, 5]
    assert had_grad == [False, True]


def test_evaluation_has_no_gradients_and_the_model_in_eval_mode() -> None:
    model, seen = nn.Linear(3, 1), []
    model.register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad)))
    Workload(model, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum()).eval_step(2)
    assert seen == [(False, False)]


def test_optimizer_state_that_steps_add_is_forgotten_and_what_was_there_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    optimizer = torch.optim.Adam(model.parameters())
    workload = Workload(model, optimizer, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum())
    first = model[0].weight
    optimizer.state[first] = {"step": torch.zeros(()), "exp_avg": torch.zeros(1, 3), "exp_avg_sq": torch.zeros(1, 3)}
    workload.begin()
    workload.train_step(2)
    assert len(optimizer.state) == 4
    workload.forget()
    assert list(map(id, optimizer.state)) == [id(first)]


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_several_optimizers_step_one_after_the_other(precision: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    stepped: list[Any] = []
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[1].parameters(), lr=0.1)]
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda optimizer, *_: stepped.append(type(optimizer)))
    before = [parameter.clone() for parameter in model.parameters()]
    workload = Workload(
        model,
        optimizers,
        sample=lambda n: torch.ones(n, 3),
        loss_fn=lambda o, b: o.float().sum(),
        precision=precision,
        max_grad_norm=1.0,
    )
    workload.scale_by_one()
    workload.begin()
    workload.train_step(2)
    assert stepped == [torch.optim.SGD, torch.optim.Adam]
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert [item for item in workload.stateful if isinstance(item, torch.optim.Optimizer)] == optimizers
    workload.forget()
    assert not optimizers[1].state


def test_the_optimizers_that_a_step_function_names_begin_anew_too() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def step(n: int) -> None:
        model(torch.ones(n, 3)).sum().backward()
        optimizer.step()

    workload = Workload.from_step(step, state=[model, optimizer])
    workload.begin()
    workload.train_step(2)
    workload.forget()
    assert not optimizer.state
    assert model.weight.grad is None


def test_the_last_output_lives_until_the_next_forward_and_no_longer_than_forget() -> None:
    import weakref

    outputs: list[weakref.ref[torch.Tensor]] = []
    alive_at_forward: list[int] = []
    model = nn.Linear(3, 1)
    model.register_forward_pre_hook(lambda m, i: alive_at_forward.append(sum(r() is not None for r in outputs)))
    model.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    workload = Workload(model, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum())
    workload.train_step(2)
    workload.train_step(2)
    assert alive_at_forward == [0, 1]
    workload.forget()
    assert [ref() for ref in outputs] == [None, None]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"model": "resnet"}, "model"),
        ({"optimizer": 3}, "optimizer"),
        ({"optimizer": [torch.optim.SGD([nn.Parameter(torch.ones(1))]), 3]}, "optimizer"),
        ({"loss_fn": 3}, "loss_fn"),
        ({"sample": None}, "sample"),
        ({"precision": "int8"}, "precision"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"mode": "test"}, "mode"),
        ({"evaluate": 3}, "evaluate"),
        ({"scheduler": 3}, "scheduler"),
        ({"scaler": 3}, "scaler"),
        ({"max_grad_norm": "a"}, "max_grad_norm"),
        ({"accumulate": 4}, "accumulate"),
        ({"extra_state": 3}, "extra_state"),
        ({"name": 3}, "name"),
        ({"optimizer": torch.optim.LBFGS([nn.Parameter(torch.ones(1))])}, "optimizer"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], argument: str) -> None:
    right = {"model": nn.Linear(1, 1), "sample": lambda n: torch.ones(n, 1)}
    with pytest.raises(InvalidArgumentError, match=f"^{argument}="):
        Workload(**{**right, **change})


def test_a_schedule_that_ends_is_no_reason_to_fail() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for scheduler in (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=2),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ):
        before = scheduler.state_dict()
        made = Workload(model, optimizer, lambda o, b: o.sum(), lambda n: torch.ones(n, 3), scheduler=scheduler)
        for _ in range(4):
            made.train_step(2)
        assert scheduler.state_dict() == before


def test_a_model_without_a_loss_says_what_is_missing() -> None:
    workload = Workload(nn.Linear(3, 2), sample=lambda n: torch.ones(n, 3))
    with pytest.raises(InvalidArgumentError, match="loss_fn"):
        workload.train_step(2)


def averaged(kind: str, model: nn.Module, calls: list[Any]) -> Any:
    class Timm(nn.Module):
        def update(self, updated: nn.Module) -> None:
            calls.append(updated)

    if kind == "torch":
        average = torch.optim.swa_utils.AveragedModel(model)
        update = average.update_parameters
        average.update_parameters = lambda updated: (calls.append(updated), update(updated))
        return average
    return Timm() if kind == "timm" else calls.append


@pytest.mark.parametrize("kind", ["torch", "timm", "function"])
def test_an_average_of_the_weights_is_updated_once_a_step(kind: str) -> None:
    model, calls = nn.Linear(3, 1), []
    ema = averaged(kind, model, calls)
    workload = Workload(
        model, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum(), ema=ema, accumulate=True
    )
    workload.train_step(2)
    assert calls == [model]
    workload.eval_step(2)
    assert len(calls) == 1
    assert any(item is ema for item in workload.stateful)


def test_an_average_of_the_weights_is_put_back() -> None:
    from autobatch import find
    from autobatch.probe.state import fingerprint

    model = nn.Linear(3, 1)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    before = fingerprint(model, ema)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    workload = Workload(model, optimizer, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum(), ema=ema)
    workload.train_step(2)
    assert fingerprint(model, ema) != before
    before = fingerprint(model, ema)
    find(workload, device="cpu", memory_limit="1GiB", max_batch_size=2)
    assert fingerprint(model, ema) == before


def test_outputs_that_are_kept_are_there_from_the_first_step_on_and_without_their_graph() -> None:
    import weakref

    outputs: list[weakref.ref[torch.Tensor]] = []
    model = nn.Linear(3, 1)
    model.register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    workload = Workload(model, sample=lambda n: torch.ones(n, 3), loss_fn=lambda o, b: o.sum(), keep_outputs=3)
    workload.train_step(2)
    kept = [tensor for output in workload._kept for tensor in output]
    assert [tensor.shape for tensor in kept] == [(2, 1)] * 3
    assert len({tensor.data_ptr() for tensor in kept}) == 3
    assert not any(tensor.requires_grad for tensor in kept)
    workload.train_step(5)
    assert [len(tensor) for output in workload._kept for tensor in output] == [2, 2, 5]
    workload.forget()
    assert not workload._kept


def test_a_scaler_forgets_the_step_that_ran_out_of_memory() -> None:
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    model = nn.Linear(2, 1)
    optimizer, scaler = Failing(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    batch = lambda n: (torch.ones(n, 2), torch.ones(n, 1))  # noqa: E731
    workload = Workload(model, optimizer, nn.functional.mse_loss, batch, scaler=scaler, max_grad_norm=1.0)
    with pytest.raises(MemoryError):
        workload.train_step(2)
    workload.forget()
    optimizer.fails = False
    workload.train_step(2)
