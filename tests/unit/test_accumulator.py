"""Accumulated gradients are the full batch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autobatch import Accumulator, AutobatchError, InvalidArgumentError, NoiseScale
from autobatch.errors import AutobatchWarning
from autobatch.probe.state import fingerprint
from tests.workloads.training import linear

IGNORED = -100


class Tied(nn.Module):
    """Tokens to logits, with one weight in two places, and one that is frozen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(torch.tanh(self.frozen(self.embedding(tokens)))))
        return logits


def tied(dropout: float = 0.0) -> Tied:
    torch.manual_seed(0)
    return Tied(dropout).double()


def token_mean(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED)


def tokens_in(batch: tuple[Tensor, Tensor]) -> Tensor:
    return (batch[1] != IGNORED).sum()


def ragged(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences of which a part is masked, some of them wholly."""
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (samples, 5), generator=chance)
    lengths = torch.randint(0, 6, (samples, 1), generator=chance)
    lengths[0] = 3
    return tokens, tokens.roll(-1, 1).masked_fill(torch.arange(5) >= lengths, IGNORED)


class Kept(torch.optim.SGD):
    """Makes no step, and keeps the gradients that it was to step with."""

    kept: list[Tensor | None]

    def step(self, closure: Any = None) -> None:
        self.kept = [None if p.grad is None else p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(model: nn.Module, loss_fn: Any, batch: Any, size: int, **options: Any) -> list[Tensor | None]:
    optimizer = Kept(model.parameters(), lr=0.1)
    window = Accumulator(model, optimizer, loss_fn, micro_batch_size=size, **options).step(batch)
    assert window.micro_batches == -(-window.samples // size)
    return optimizer.kept


def full_batch(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss_fn(model(batch[0]), batch[1]).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 1e-12 * max(1.0, float(other.abs().max()))


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 12), size=st.integers(1, 13), seed=st.integers(0, 50))
def test_token_means_over_ragged_samples_are_the_full_batchs(samples: int, size: int, seed: int) -> None:
    model, batch = tied(), ragged(samples, seed)
    assert_same(gradients(model, token_mean, batch, size, count=tokens_in), full_batch(model, token_mean, batch))


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 12), size=st.integers(1, 13), reduction=st.sampled_from(["mean", "sum"]))
def test_sample_means_and_sums_are_the_full_batchs(samples: int, size: int, reduction: str) -> None:
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss(reduction=reduction)
    batch = torch.randn(samples, 3).double(), torch.randn(samples, 2).double()
    assert_same(gradients(model, loss_fn, batch, size, reduction=reduction), full_batch(model, loss_fn, batch))


def test_a_mean_of_means_is_another_gradient() -> None:
    """The control: counted by samples, a mean over tokens is off by far more than rounding."""
    model, batch = tied(), ragged(12, seed=1)
    wrong, right = gradients(model, token_mean, batch, 6), full_batch(model, token_mean, batch)
    assert wrong[0] is not None
    assert right[0] is not None
    assert (wrong[0] - right[0]).norm() > 0.01 * right[0].norm()


def test_accelerates_first_example() -> None:
    """Its guide to gradient accumulation: lr 0.02, four micro-batches, 2.04000."""
    model, x = nn.Linear(1, 1, bias=False), torch.arange(1.0, 9.0)[:, None]
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    window = Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=2).step((x, 2 * x))
    assert (window.micro_batches, window.terms, window.stepped) == (4, 8, True)
    assert f"{model.weight.item():.5f}" == "2.04000"
    assert float(window.loss) == pytest.approx(102.0)
    assert window.grad_norm is not None
    assert float(window.grad_norm) == pytest.approx(102.0)


@pytest.mark.parametrize(("count", "expected"), [(tokens_in, [0.0953, 0.4337]), (None, [0.0775, 0.4514])])
def test_accelerates_causal_example_and_its_control(count: Any, expected: list[float]) -> None:
    """The same guide: eight sequences of 1 to 8 tokens, lr 0.08; a mean of means gives the second."""
    torch.manual_seed(0)
    model = nn.Linear(1, 2, bias=False)
    assert [round(value, 4) for value in model.weight.flatten().tolist()] == [-0.0075, 0.5364]
    texts = [torch.arange(1.0, length + 1) for length in range(1, 9)]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORED)
    labels = torch.where(ids == IGNORED, ids, ids % 2).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)
    Accumulator(model, optimizer, token_mean, micro_batch_size=4, count=count).step((ids[..., None], labels))
    assert [round(value, 4) for value in model.weight.flatten().tolist()] == expected


def test_what_is_masked_altogether_counts_nothing_and_makes_no_step() -> None:
    model, (tokens, labels) = tied(), ragged(4, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.warns(AutobatchWarning, match="window 0 has no loss term"):
        window = Accumulator(model, optimizer, token_mean, micro_batch_size=2, count=tokens_in).step(
            (tokens, labels.fill_(IGNORED))
        )
    assert (window.terms, window.stepped, window.grad_norm) == (0, False, None)
    assert fingerprint(model, optimizer) == before


@dataclasses.dataclass
class Record:
    x: Tensor
    names: list[str]
    scale: float


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(5, 3)},
        Record(x=torch.ones(5, 3), names=list("abcde"), scale=2.0),
        (torch.ones(5, 3), torch.ones(5)),
        [torch.ones(5, 3), {"target": torch.ones(5), "names": list("abcde")}],
    ],
)
def test_batches_of_every_kind_are_split(batch: Any) -> None:
    seen: list[Any] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Any) -> Tensor:
            seen.append(x)
            return (x.x if isinstance(x, Record) else x) @ self.weight  # type: ignore[no-any-return]

    net = Net()
    Accumulator(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda o, b: o.mean(), micro_batch_size=2).step(batch)
    assert [len(x.x if isinstance(x, Record) else x) for x in seen] == [2, 2, 1]
    if isinstance(batch, Record):
        assert [record.names for record in seen] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_model_that_returns_its_loss() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": super().forward(x).mean()}

    net = Net(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert Accumulator(net, optimizer, micro_batch_size=4).step(torch.ones(9, 3)).micro_batches == 3


def test_batch_norm_is_warned_of_once_and_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    accumulator = Accumulator(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda o, b: o.mean(), micro_batch_size=4)
    with pytest.warns(AutobatchWarning, match="^1 takes its statistics from a micro-batch"):
        accumulator.step(torch.randn(8, 3))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulator.step(torch.randn(8, 3))


def test_terms_may_be_a_sum_of_weights() -> None:
    weights = torch.tensor([0.3, 0.45], dtype=torch.float64)
    model, loss_fn = nn.Linear(3, 2).double(), nn.CrossEntropyLoss(weight=weights)
    batch = torch.randn(9, 3).double(), torch.tensor([0, 1, 1, 1, 0, 0, 0, 0, 1])
    ours = gradients(model, loss_fn, batch, 4, count=lambda part: weights[part[1]].sum())
    assert_same(ours, full_batch(model, loss_fn, batch))


def test_a_compiled_model_is_not_compiled_for_every_size() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(torch.compile(model, backend="eager"), optimizer, nn.MSELoss(), micro_batch_size=8)
    for samples in (30, 19, 23, 40):
        accumulator.step((torch.ones(samples, 6), torch.ones(samples, 2)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_bf16_is_autocast() -> None:
    seen: list[torch.dtype] = []
    model, accumulator = linear(lambda o, b: seen.append(o.dtype) or o.float().mean(), precision="bf16")
    accumulator.step(torch.ones(4, 6))
    assert seen == [torch.bfloat16]
    assert model.weight.dtype is torch.float32


ADAM = torch.optim.AdamW([nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"model": 3}, "model"),
        ({"optimizer": None}, "optimizer"),
        ({"optimizer": []}, "optimizer"),
        ({"loss_fn": 3}, "loss_fn"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"count": 3}, "count"),
        ({"reduction": "none"}, "reduction"),
        ({"precision": "int8"}, "precision"),
        ({"precision": "fp16"}, "scaler"),
        ({"max_grad_norm": -1}, "max_grad_norm"),
        ({"grow_after": 0}, "grow_after"),
        ({"on_recovery": 3}, "on_recovery"),
        ({"scheduler": 3}, "scheduler"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(ADAM)}, "scheduler"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], argument: str) -> None:
    model = nn.Linear(1, 1)
    right = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "micro_batch_size": 2}
    with pytest.raises(InvalidArgumentError, match=f"^{argument}="):
        Accumulator(**{**right, **change})


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (3, "batch='int': must be one with tensors"),
        ({"x": torch.ones(4, 3), "y": torch.ones(5)}, r"tensors of shapes \['x'\] \(4, 3\), \['y'\] \(5,\)"),
        ((torch.ones(4), [torch.ones(4), torch.ones(5)]), r"\[0\] \(4,\), \[1\]\[0\] \(4,\), \[1\]\[1\] \(5,\)"),
    ],
)
def test_a_batch_that_cannot_be_split_says_why(batch: Any, said: str) -> None:
    _, accumulator = linear(nn.MSELoss())
    with pytest.raises(InvalidArgumentError, match=said):
        accumulator.step(batch)


def test_a_loss_that_is_a_vector_is_refused() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, lambda o, b: o.squeeze(), micro_batch_size=2)
    with pytest.raises(AutobatchError, match=r"loss_fn='a function that returns a tensor of shape \(2,\)'"):
        accumulator.step(torch.ones(4, 3))


@pytest.mark.parametrize(("reduction", "options"), [("mean", {}), ("sum", {}), ("mean", {"scaler": True})])
def test_the_noise_scale_of_its_micro_batches(reduction: str, options: dict[str, Any]) -> None:
    """Measured amid training, it is that of the gradients computed one by one, whatever they are multiplied with."""
    model = nn.Linear(3, 1).double()
    noise, exact = NoiseScale(decay=0.0), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if options else None
    accumulator = Accumulator(
        model,
        Kept(model.parameters(), lr=0.1),
        nn.MSELoss(reduction=reduction),
        micro_batch_size=3,
        reduction=reduction,
        noise=noise,
        scaler=scaler,
        max_grad_norm=0.001,  # which comes after
    )
    batch = torch.randn(7, 3).double(), torch.randn(7, 1).double() + 3.0
    for begin, end in ((0, 3), (3, 5), (5, 7), (0, 7)):
        gradient = full_batch(model, nn.MSELoss(), (batch[0][begin:end], batch[1][begin:end]))
        exact.append(sum(float((part**2).sum()) for part in gradient if part is not None))
    model.zero_grad()
    accumulator.step(batch)
    trace = (3 * exact[0] + 2 * exact[1] + 2 * exact[2] - 7 * exact[3]) / 2
    assert noise.batch_size == pytest.approx(max(0.0, trace) / (exact[3] - trace / 7))


def test_one_window_in_so_many_is_looked_at() -> None:
    model = nn.Linear(6, 2)
    noise = NoiseScale(every=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=2, noise=noise)
    for _ in range(50):
        accumulator.step((torch.randn(4, 6), torch.randn(4, 2)))
    assert noise.windows == 32 + 5
    with pytest.raises(InvalidArgumentError, match="every=0"):
        NoiseScale(every=0)


@pytest.mark.parametrize("names", [list("abcde"), tuple("abcde"), numpy.array(list("abcde"))])
def test_columns_that_are_no_tensors_are_cut_with_the_samples(names: Any) -> None:
    seen: list[str] = []

    class Net(nn.Linear):
        def forward(self, x: Tensor, names: Any) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    net = Net(3, 1)
    loss_fn = lambda output, batch: seen.append("".join(batch["names"])) or output.mean()  # noqa: E731
    accumulator = Accumulator(net, torch.optim.SGD(net.parameters(), lr=0.1), loss_fn, micro_batch_size=2)
    accumulator.step({"x": torch.ones(5, 3), "names": names})
    assert seen == ["ab", "cd", "e"]


def test_a_count_for_each_sample_is_refused() -> None:
    _, accumulator = linear(nn.MSELoss(), count=lambda batch: torch.ones(len(batch[0])))
    with pytest.raises(InvalidArgumentError, match=r"count='a function that returns a tensor of shape \(4,\)'"):
        accumulator.step((torch.ones(4, 6), torch.ones(4, 2)))


def test_a_scaler_that_is_switched_off_changes_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, accumulator = linear(lambda output, target: output.sum() * float("nan"), scaler=scaler)
    assert accumulator.step((torch.ones(4, 6), torch.ones(4, 2))).stepped
    assert model.weight.isnan().all()


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match="optimizer='SGD of parameters that the model does not have'"):
        Accumulator(nn.Linear(3, 1), other, micro_batch_size=2)
