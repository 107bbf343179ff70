"""Accumulated gradients are the full batch's, and a window that runs out of memory is repeated as if it never had."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import Accumulator, AutobatchError, DoesNotFitError, InvalidArgumentError
from autobatch.errors import AutobatchWarning, RankError
from autobatch.probe.state import fingerprint
from autobatch.training.recovery import Recovery

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


# The gradient.


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


# Recovery.


class RunsOut(TorchDispatchMode):
    """Runs out of memory at the ``fail_at``-th operator, as an allocator would."""

    def __init__(self, fail_at: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB.") -> None:
        super().__init__()
        self.left, self.message, self.failed = fail_at, message, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func.namespace != "profiler"  # a mark that takes no memory
        if self.left == 0 and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError(self.message)
        return func(*args, **(kwargs or {}))


class Noisy(nn.Module):
    """Draws random numbers and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.full_like(x, random.random())
        out: Tensor = self.layers(x + noise * torch.randn_like(x))
        return out


def noisy(size: int, **options: Any) -> tuple[Noisy, Accumulator, torch.optim.Optimizer]:
    torch.manual_seed(3)
    random.seed(3)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=size, **options), optimizer


def windows(count: int) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(9)
    sizes = [random.Random(4 + i).randint(17, 24) for i in range(count)]
    return [(torch.randn(n, 6, generator=chance), torch.randn(n, 2, generator=chance)) for n in sizes]


def operators_of_a_window() -> int:
    _, accumulator, _ = noisy(8)
    with RunsOut(10**9) as mode:
        accumulator.step(windows(1)[0])
    return 10**9 - mode.left


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_operator_of_forward_and_backward_can_run_out_and_nothing_is_different(stride: int) -> None:
    """Bit-identical to a run that takes the smaller micro-batches from that window on."""
    batches, failed = windows(3), 0
    for fail_at in range(1, operators_of_a_window(), stride):
        told: list[Recovery] = []
        model, accumulator, optimizer = noisy(8, on_recovery=told.append)
        accumulator.step(batches[0])
        mode = RunsOut(fail_at)
        try:
            with mode:
                accumulator.step(batches[1])
        except DoesNotFitError as exc:
            assert "in the optimizer's step of window 1, which cannot be undone" in str(exc)  # noqa: PT017
            break
        accumulator.step(batches[2])
        reference, smaller, its_optimizer = noisy(8)
        smaller.step(batches[0])
        if told:
            failed += 1
            assert [(r.window, r.next_micro_batch_size) for r in told] == [(1, 4)]
            assert 4 < told[0].micro_batch_size <= 8
            assert told[0].message.startswith("CUDA out of memory")
            smaller.micro_batch_size = 4
        smaller.step(batches[1])
        smaller.step(batches[2])
        assert fingerprint(model, optimizer) == fingerprint(reference, its_optimizer)
    assert failed > 100 / stride


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
def test_where_not_even_one_sample_fits_everything_is_as_before() -> None:
    model, accumulator, optimizer = noisy(4)
    model.eval()  # batch norm refuses one sample

    class Never(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    refused = Accumulator(model, optimizer, Never(), micro_batch_size=4)
    before = fingerprint(model, optimizer)
    with pytest.raises(DoesNotFitError, match="in window 0 not even one sample fits: CUDA out of memory"):
        refused.step(windows(1)[0])
    assert fingerprint(model, optimizer) == before
    assert accumulator.step(windows(1)[0]).stepped


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
def test_it_grows_again_where_that_was_asked_for() -> None:
    batch = windows(1)[0]
    _, accumulator, _ = noisy(8, grow_after=2)
    with RunsOut(20):
        accumulator.step(batch)
    sizes = []
    for _ in range(4):
        sizes.append(accumulator.micro_batch_size)
        accumulator.step(batch)
    assert sizes == [4, 4, 8, 8]


class Fails(nn.Module):
    """A loss that fails at its ``at``-th call with ``error``, and counts its calls in a buffer."""

    calls: Tensor

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__()
        self.at, self.error = at, error
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.at -= 1
        if self.at == 0:
            raise self.error
        return nn.functional.mse_loss(output, target)


SUSPECT = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def linear(loss_fn: Any, size: int = 8, **options: Any) -> tuple[nn.Linear, Accumulator]:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, Accumulator(model, optimizer, loss_fn, micro_batch_size=size, **options)


@pytest.mark.parametrize("error", [OUT, SUSPECT, RuntimeError("too many INT_MAX elements")])
def test_what_means_memory_or_may_mean_it_is_tried_smaller_and_the_loss_is_put_back(error: Exception) -> None:
    model, accumulator = linear(loss := Fails(2, error))
    accumulator.step(windows(1)[0])
    reference, smaller = linear(Fails(0, error), size=4)
    smaller.step(windows(1)[0])
    assert torch.equal(model.weight, reference.weight)
    assert accumulator.micro_batch_size == 4
    assert loss.calls.item() == -(-len(windows(1)[0][0]) // 4)


@pytest.mark.parametrize(("error", "raised"), [(OUT, DoesNotFitError), (SUSPECT, RuntimeError)])
def test_a_window_that_is_given_up_says_nothing_of_the_next(error: Exception, raised: type[Exception]) -> None:
    class Always(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            raise error

    _, accumulator = linear(Always())
    with pytest.raises(raised):
        accumulator.step(windows(1)[0])
    assert accumulator.micro_batch_size == 8


def test_an_error_that_the_caller_is_handling_means_nothing_here() -> None:
    _, accumulator = linear(nn.MSELoss())
    try:
        raise OUT
    except torch.OutOfMemoryError:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            accumulator.step((torch.ones(8, 5), torch.ones(8, 2)))
    assert accumulator.micro_batch_size == 8


def test_buffers_that_are_replaced_and_generators_are_put_back() -> None:
    class Drawing(nn.Linear):
        average: Tensor

        def __init__(self) -> None:
            super().__init__(6, 2)
            self.register_buffer("average", torch.zeros(2))
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x + torch.randn(6, generator=self.generator))
            self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
            return out + self.average

    def trained(loss_fn: Any, size: int) -> Drawing:
        torch.manual_seed(0)
        model = Drawing()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Accumulator(model, optimizer, loss_fn, micro_batch_size=size).step(windows(1)[0])
        return model

    ours, theirs = trained(Fails(2, OUT), 8), trained(Fails(0, OUT), 4)
    assert torch.equal(ours.average, theirs.average)
    assert torch.equal(ours.weight, theirs.weight)


def test_a_recovered_window_keeps_nothing_of_the_batch_alive() -> None:
    import gc
    import weakref

    loss = Fails(2, torch.OutOfMemoryError("CUDA out of memory."))
    _, accumulator = linear(loss)
    gc.disable()
    try:
        x, y = windows(1)[0]
        batch = x.clone()
        alive = weakref.ref(batch)
        accumulator.step((batch, y))
        del batch, loss.error  # which keeps its own traceback
        assert alive() is None
    finally:
        gc.enable()


class Bursts(torch.optim.SGD):
    """Runs out of memory in its first step."""

    burst = False

    def step(self, closure: Any = None) -> None:
        if not self.burst:
            self.burst = True
            raise OUT
        super().step(closure)


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


def test_one_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RankError, match="one of 2 ranks"):
        linear(nn.MSELoss())


@pytest.mark.filterwarnings("ignore")
def test_bf16_is_autocast() -> None:
    seen: list[torch.dtype] = []
    model, accumulator = linear(lambda o, b: seen.append(o.dtype) or o.float().mean(), precision="bf16")
    accumulator.step(torch.ones(4, 6))
    assert seen == [torch.bfloat16]
    assert model.weight.dtype is torch.float32


def test_another_error_flies_and_leaves_no_gradient() -> None:
    model, accumulator = linear(Fails(2, KeyError("row 5")))
    with pytest.raises(KeyError, match="row 5"):
        accumulator.step(windows(1)[0])  # amid the second micro-batch
    assert all(parameter.grad is None for parameter in model.parameters())


# Bad input.

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
        ({"x": torch.ones(4, 3), "y": torch.ones(5)}, r"tensors of shapes \[\(4, 3\), \(5,\)\]"),
    ],
)
def test_a_batch_that_cannot_be_split_says_why(batch: Any, said: str) -> None:
    _, accumulator, _ = noisy(8)
    with pytest.raises(InvalidArgumentError, match=said):
        accumulator.step(batch)


def test_a_loss_that_is_a_vector_is_refused() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, lambda o, b: o.squeeze(), micro_batch_size=2)
    with pytest.raises(AutobatchError, match=r"loss_fn='a function that returns a tensor of shape \(2,\)'"):
        accumulator.step(torch.ones(4, 3))
