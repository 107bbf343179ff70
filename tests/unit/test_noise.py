"""The noise scale is that of the gradients, whatever the sizes, and measuring it changes nothing."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autobatch import InvalidArgumentError, NoiseScale
from autobatch.errors import AutobatchWarning
from autobatch.ranks import Ranks

ALONE = Ranks()
Batch = tuple[Tensor, Tensor]


class Several(Ranks):
    """One of several ranks, which hears the others from a list. The first round only takes down what each said."""

    def __init__(self, said: list[list[float]], size: int) -> None:
        super().__init__()
        self.said, self.size = said, size

    def sums(self, values: Sequence[float]) -> list[float]:
        self.said.append(list(values))
        return [sum(column) for column in zip(*self.said, strict=True)]


def window(noise: NoiseScale, gradients: Sequence[Tensor], terms: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """One window of a model that is a vector, whose micro-batches have these gradients. Returns the whole gradient."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    noise.watch([weight])
    for gradient, count in zip(gradients, terms, strict=True):
        share = count / sum(terms) * scale
        with noise.micro_batch(terms=count, share=share):
            (weight @ gradient * share).backward()
    assert weight.grad is not None
    whole = weight.grad / scale
    noise.finish(grad_norm=torch.linalg.vector_norm(whole), ranks=ALONE)
    return whole


def averages(noise: NoiseScale) -> tuple[float, float]:
    """tr(S) and |G|^2."""
    state = noise.state_dict()
    return state["trace"], state["square"]


VECTORS = st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=2, max_size=6)


@settings(deadline=None, max_examples=60)
@given(vectors=VECTORS, chance=st.integers(0, 99), scale=st.sampled_from([1.0, 2.0**16]))
def test_a_window_is_what_the_formulas_say(vectors: list[list[float]], chance: int, scale: float) -> None:
    parts = torch.tensor(vectors, dtype=torch.float64)
    terms = [float(random.Random(chance + j).randint(1, 9)) for j in range(len(parts))]
    noise = NoiseScale()
    window(noise, list(parts), terms, scale=scale)
    counts, total = torch.tensor(terms, dtype=torch.float64), sum(terms)
    whole = (counts[:, None] * parts).sum(0) / total
    # Written as the scatter of the parts around the whole, which is another way to the same.
    trace = float((counts * (parts - whole).square().sum(1)).sum() / (len(parts) - 1))
    square = float(whole.square().sum()) - trace / total
    room = 1e-9 * max(1.0, float(parts.square().sum()) * max(terms))
    assert averages(noise) == pytest.approx((trace, square), abs=room)
    if square > room:
        assert noise.batch_size == pytest.approx(max(trace, 0) / square, rel=1e-6, abs=1e3 * room / square)
    elif square < -room:
        assert noise.batch_size is None


@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) <= 7))
def test_unbiased_for_any_sizes(sizes: list[int]) -> None:
    """Exactly: over every way in which terms can be one of two gradients, the mean is the truth."""
    mean, spread = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.25], dtype=torch.float64)
    found: list[tuple[float, float]] = []
    for signs in itertools.product([-1.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(signs, dtype=torch.float64).split(sizes)
        noise = NoiseScale()
        window(noise, [mean + part.mean() * spread for part in parts], [float(size) for size in sizes])
        found.append(averages(noise))
    trace, square = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
    assert trace == pytest.approx(float(spread @ spread), rel=1e-9)
    assert square == pytest.approx(float(mean @ mean), rel=1e-9)


def test_gaussian_gradients_of_known_covariance() -> None:
    chance = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=chance, dtype=torch.float64)
    mean, sizes = torch.ones(6, dtype=torch.float64), [1, 3, 12, 16]
    found: list[tuple[float, float]] = []
    for _ in range(1500):
        draws = [torch.randn(6, generator=chance, dtype=torch.float64) / math.sqrt(size) for size in sizes]
        noise = NoiseScale()
        window(noise, [mean + factor @ draw for draw in draws], [float(size) for size in sizes])
        found.append(averages(noise))
    for values, truth in zip(zip(*found, strict=True), (float(factor.square().sum()), 6.0), strict=True):
        drawn = torch.tensor(values)
        error = float(drawn.std()) / math.sqrt(len(drawn))
        assert error < 0.05 * truth, "or the test could not fail"
        assert abs(float(drawn.mean()) - truth) < 3 * error


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Batch]:
    """Images of 8x8 that look like one of ten, and a network that has learned a little."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (1024,))
    images = torch.randn(10, 8, 8)[labels] + 2.0 * torch.randn(1024, 8, 8)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, (images, labels)


def exact(model: nn.Module, batch: Batch) -> float:
    """tr(S) / |G|^2, from the gradient of every image."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, weights, (image[None],))
        return nn.functional.cross_entropy(output, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, *batch)
    rows = torch.cat([gradient.flatten(1) for gradient in each.values()], dim=1).double()
    return float((rows - rows.mean(0)).square().sum(1).mean() / rows.mean(0).square().sum())


UNEQUAL = [4, 8, 12, 20, 20, 28, 32, 4]


def measured(
    noise: NoiseScale, model: nn.Module, batch: Batch, seed: int, told: Sequence[float] = UNEQUAL
) -> float | None:
    """The noise scale after a hundred windows of fixed weights, drawn with replacement as the exact one has it."""
    chance, total = torch.Generator().manual_seed(seed), sum(UNEQUAL)
    noise.watch(model.parameters())
    for _ in range(100):
        model.zero_grad()
        drawn = torch.randint(0, len(batch[0]), (total,), generator=chance).split(UNEQUAL)
        for rows, count in zip(drawn, told, strict=True):
            loss = nn.functional.cross_entropy(model(batch[0][rows]), batch[1][rows]) * (len(rows) / total)
            with noise.micro_batch(terms=count, share=len(rows) / total):
                loss.backward()
        noise.finish(grad_norm=whole_norm(model), ranks=ALONE)
    noise.close()
    return noise.batch_size


def whole_norm(model: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("seed", range(4))
def test_digits_agree_with_the_gradient_of_every_image(digits: tuple[Digits, Batch], seed: int) -> None:
    noise = NoiseScale()
    assert measured(noise, *digits, seed) == pytest.approx(exact(*digits), rel=0.1)
    assert noise.windows == 100


@pytest.mark.slow
def test_sizes_that_are_ignored_are_another_noise_scale(digits: tuple[Digits, Batch]) -> None:
    """The control: as if every micro-batch had the same size."""
    right, wrong = NoiseScale(), NoiseScale()
    measured(right, *digits, 0)
    scale = measured(wrong, *digits, 0, told=[sum(UNEQUAL) / len(UNEQUAL)] * len(UNEQUAL))
    assert averages(wrong)[0] > 1.5 * averages(right)[0]
    assert scale is None or abs(scale - exact(*digits)) > 0.5 * exact(*digits)


def test_all_micro_batches_are_used() -> None:
    """The control: the last one alone against the whole, as peers do it, scatters far more around the truth."""
    chance, sizes = torch.Generator().manual_seed(0), [8.0] * 8
    ours, theirs = [], []
    for _ in range(300):
        parts = [1.0 + torch.randn(50, generator=chance) for _ in sizes]
        noise = NoiseScale()
        whole = window(noise, parts, sizes)
        ours.append(averages(noise)[0])
        theirs.append(float((parts[-1].square().sum() - whole.square().sum()) / (1 / 8 - 1 / 64)))
    assert float(torch.tensor(theirs).std()) > 3 * float(torch.tensor(ours).std())


def test_averages_are_debiased_and_divided_after() -> None:
    noise, decay = NoiseScale(decay=0.5), 0.5
    single: list[tuple[float, float]] = []
    for value in (1.0, 5.0, 2.0):
        parts = [torch.tensor([3.0, value]), torch.tensor([3.0, -value]), torch.tensor([4.0, 0.0])]
        window(noise, parts, [1.0, 2.0, 1.0])
        alone = NoiseScale()
        window(alone, parts, [1.0, 2.0, 1.0])
        single.append(averages(alone))
    weights = [decay**2, decay, 1.0]
    expected = [
        sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
        for values in zip(*single, strict=True)
    ]
    assert averages(noise) == pytest.approx(tuple(expected), rel=1e-5)
    assert noise.batch_size == pytest.approx(expected[0] / expected[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:no noise scale")  # the first rank to speak hears nobody
@settings(deadline=None, max_examples=25)
@given(vectors=VECTORS.filter(lambda vectors: len(vectors) > 2), cut=st.integers(0, 6))
def test_ranks_are_one_window(vectors: list[list[float]], cut: int) -> None:
    """Whatever part of the micro-batches a rank has, none included."""
    parts = [torch.tensor(vector, dtype=torch.float64) for vector in vectors]
    terms = [float(j + 1) for j in range(len(parts))]
    together = NoiseScale()
    whole = torch.linalg.vector_norm(window(together, parts, terms))
    said: list[list[float]] = []
    for rank in (slice(cut, None), slice(0, cut)):
        noise, weight = NoiseScale(), nn.Parameter(torch.zeros(3, dtype=torch.float64))
        noise.watch([weight])
        for gradient, count in list(zip(parts, terms, strict=True))[rank]:
            with noise.micro_batch(terms=count, share=count / sum(terms)):
                (weight @ gradient * (count / sum(terms))).backward()
        noise.finish(grad_norm=whole, ranks=Several(said, size=2))
    assert averages(noise) == pytest.approx(averages(together), rel=1e-9, abs=1e-9)
    assert len(said) == 2


def trained(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(6, 5)


def test_gradients_are_bit_identical() -> None:
    kept: list[list[Tensor]] = []
    for noise in (None, NoiseScale()):
        model, x = trained()
        if noise is not None:
            noise.watch(model.parameters())
        for rows in x.split(2):
            loss = model(rows).square().mean() / 3
            if noise is None:
                loss.backward()
            else:
                with noise.micro_batch(terms=2, share=1 / 3):
                    loss.backward()
        kept.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(kept[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_nothing_is_kept_alive_and_a_first_gradient_is_not_copied() -> None:
    weight, noise = nn.Parameter(torch.zeros(100)), NoiseScale()
    noise.watch([weight])
    seen: list[Any] = []
    weight.register_hook(lambda gradient: seen.extend([weakref.ref(gradient), gradient.data_ptr()]))
    with noise.micro_batch(terms=1, share=1.0):
        (weight @ torch.ones(100)).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == seen[1]
    weight.grad = None
    gc.collect()
    assert seen[0]() is None


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_backward_with_a_graph_leaves_none_behind() -> None:
    weight, noise = nn.Parameter(torch.ones(3)), NoiseScale()
    noise.watch([weight])
    for _ in range(2):
        with noise.micro_batch(terms=1, share=0.5):
            (weight.pow(3).sum() / 2).backward(create_graph=True)
        assert not noise._window[-1][1].requires_grad
        weight.grad = None


def test_the_users_own_backward_does_not_count() -> None:
    model, x = trained()
    noise, other = NoiseScale(), NoiseScale()
    for one in (noise, other):
        model.zero_grad()
        one.watch(model.parameters())
        for rows in x.split(3):
            with one.micro_batch(terms=3, share=0.5):
                (model(rows).square().mean() / 2).backward()
        norm = whole_norm(model)
        if one is other:
            model(100 * x).sum().backward()
            assert one._seen is None
        one.finish(grad_norm=norm, ranks=ALONE)
        one.close()
    assert averages(noise) == averages(other)
    assert noise.windows == 1


def out_of_memory() -> None:
    raise MemoryError


def test_a_window_that_is_dropped_counts_nothing() -> None:
    parts, terms = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], [1.0, 3.0]
    plain, dropped = NoiseScale(), NoiseScale()
    window(plain, parts, terms)
    weight = nn.Parameter(torch.zeros(2))
    dropped.watch([weight])
    for gradient, share in zip(parts, (0.25, 0.75), strict=True):
        with dropped.micro_batch(terms=1, share=share):
            (weight @ gradient * share).backward()
        with contextlib.suppress(MemoryError), dropped.micro_batch(terms=1, share=share):
            (weight @ gradient * share).backward()
            out_of_memory()
    dropped.drop()
    nn.ParameterList([weight]).zero_grad()
    for gradient, count in zip(parts, terms, strict=True):
        with dropped.micro_batch(terms=count, share=count / 4):
            (weight @ gradient * (count / 4)).backward()
    assert weight.grad is not None
    dropped.finish(grad_norm=torch.linalg.vector_norm(weight.grad), ranks=ALONE)
    assert dropped.state_dict() == plain.state_dict()


def test_a_micro_batch_that_failed_is_not_one() -> None:
    weight, noise = nn.Parameter(torch.zeros(2)), NoiseScale()
    noise.watch([weight])
    with pytest.raises(MemoryError), noise.micro_batch(terms=1, share=1.0):
        out_of_memory()
    assert noise._window == []
    assert noise._seen is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_tells_nothing_is_left_out(bad: float) -> None:
    noise = NoiseScale()
    assert (noise.batch_size, noise.windows) == (None, 0)
    window(noise, [torch.tensor([1.0, 2.0])], [4.0])
    window(noise, [torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0])], [4.0, 4.0])
    assert (noise.batch_size, noise.windows) == (None, 0)
    window(noise, [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])], [4.0, 4.0])
    known = noise.batch_size
    window(noise, [torch.tensor([bad, 2.0]), torch.tensor([2.0, 2.0])], [4.0, 4.0])
    window(noise, [torch.tensor([7.0, 2.0])], [4.0])
    assert noise.batch_size == known is not None
    assert noise.windows == 1


def test_unknown_while_noise_hides_the_gradient() -> None:
    noise = NoiseScale()
    window(noise, [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])], [1.0, 1.0])
    assert (noise.batch_size, noise.windows) == (None, 1)


def test_parts_that_agree_have_no_noise() -> None:
    noise = NoiseScale()
    for _ in range(5):
        window(noise, [torch.tensor([0.1, 0.7])] * 3, [1.0, 2.0, 4.0])
    assert noise.batch_size == pytest.approx(0.0, abs=1e-5)


def test_windows_are_read_late_and_are_the_same() -> None:
    often, seldom = NoiseScale(), NoiseScale()
    torch.manual_seed(0)
    for _ in range(150):
        parts = [1.0 + torch.randn(4) for _ in range(3)]
        window(seldom, parts, [1.0, 2.0, 3.0])
        assert len(seldom._waiting) < 64
        window(often, parts, [1.0, 2.0, 3.0])
        assert often.windows
    assert seldom._waiting
    assert seldom.state_dict() == often.state_dict()


def test_tied_weights_count_once() -> None:
    weight, noise = nn.Parameter(torch.zeros(2)), NoiseScale()
    noise.watch([weight, weight])
    with noise.micro_batch(terms=2, share=0.5):
        (0.5 * (weight @ torch.tensor([1.0, 0.0]) + weight @ torch.tensor([2.0, 4.0]))).backward()
    assert [float(norm) for _, norm in noise._window] == [5.0]


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_in_parts_is_left_out() -> None:
    """Re-entrant checkpoints run a backward pass of their own, after each of which a tied weight sees a hook."""
    layer, noise = nn.Linear(3, 3), NoiseScale()
    noise.watch(layer.parameters())
    for _ in range(2):
        x = torch.randn(4, 3, requires_grad=True)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
        with noise.micro_batch(terms=4, share=0.5):
            (x.square().mean() / 2).backward()
    assert all(math.isnan(norm) for _, norm in noise._window)
    noise.finish(grad_norm=whole_norm(layer), ranks=ALONE)
    assert noise.windows == 0


def test_sparse_half_and_complex_gradients() -> None:
    noise = NoiseScale()
    table = nn.Embedding(4, 2, sparse=True)
    narrow = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    turned = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    noise.watch([table.weight, narrow, wide, turned])
    with noise.micro_batch(terms=1, share=1.0):
        rows = table(torch.tensor([1, 1, 2]))  # row 1 twice: its two gradients are one of twice the size
        (rows.sum() + (narrow * 300).sum() + (wide * 7).sum() + (turned * (3 + 4j)).real.sum()).backward()
    squares = (4 + 4 + 1 + 1) + 3 * 300.0**2 + 2 * 49 + 2 * 25
    ((_, norm),) = noise._window
    assert float(norm) == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_a_model_that_changes_its_type_is_still_seen() -> None:
    model, x = trained()
    noise = NoiseScale()
    noise.watch(model.parameters())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype).zero_grad()
        for rows in x.to(dtype).split(3):
            with noise.micro_batch(terms=3, share=0.5):
                (model(rows).square().mean() / 2).backward()
        noise.finish(grad_norm=whole_norm(model), ranks=ALONE)
    assert noise.windows == 4


def test_a_gradient_that_hooks_did_not_see_is_warned_of() -> None:
    seen, unseen, noise = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), NoiseScale()
    noise.watch([seen])
    for _ in range(2):
        with noise.micro_batch(terms=1, share=0.5):
            (0.5 * (seen.sum() + 3 * unseen.sum())).backward()
    noise.finish(grad_norm=torch.linalg.vector_norm(torch.tensor([1.0, 1.0, 3.0, 3.0])), ranks=ALONE)
    with pytest.warns(AutobatchWarning, match="larger than what hooks"):
        assert noise.batch_size is None
    assert noise.windows == 0


def test_state_goes_on_exactly() -> None:
    chance = torch.Generator().manual_seed(0)
    windows = [[1.0 + torch.randn(4, generator=chance) for _ in range(3)] for _ in range(20)]
    straight, first = NoiseScale(decay=0.9), NoiseScale(decay=0.9)
    for parts in windows:
        window(straight, parts, [1.0, 2.0, 3.0])
    for parts in windows[:7]:
        window(first, parts, [1.0, 2.0, 3.0])
    state = first.state_dict()
    assert all(type(value) in (int, float) for value in state.values())
    second = NoiseScale()
    window(second, windows[0], [1.0, 2.0, 3.0])  # which is forgotten
    second.load_state_dict(state)
    for parts in windows[7:]:
        window(second, parts, [1.0, 2.0, 3.0])
    assert second.state_dict() == straight.state_dict()
    assert second.batch_size == straight.batch_size is not None


def test_close_takes_the_hooks_off_and_keeps_what_is_known() -> None:
    model, x = trained()
    noise = NoiseScale()
    noise.watch(model.parameters())
    noise.watch(model.parameters())
    assert [len(weight._backward_hooks or ()) for weight in model.parameters()] == [1] * 4
    for rows in x.split(3):
        with noise.micro_batch(terms=3, share=0.5):
            (model(rows).square().mean() / 2).backward()
    noise.finish(grad_norm=whole_norm(model), ranks=ALONE)
    known = noise.state_dict()
    noise.close()
    noise.close()
    assert [len(weight._backward_hooks or ()) for weight in model.parameters()] == [0] * 4
    for rows in x.split(3):
        with noise.micro_batch(terms=3, share=0.5):
            model(rows).sum().backward()
    noise.finish(grad_norm=1.0, ranks=ALONE)
    assert noise.state_dict() == known


def test_what_is_frozen_has_no_hook_and_no_terms_no_part() -> None:
    model, _ = trained()
    next(model.children()).requires_grad_(False)
    noise = NoiseScale()
    noise.watch(model.parameters())
    with noise.micro_batch(terms=0, share=0.0):
        pass
    assert noise._window == []
    assert [len(weight._backward_hooks or ()) for weight in model.parameters()] == [0, 0, 1, 1]


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, math.nan, True, "0.9", None])
def test_a_wrong_decay_is_named(decay: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^decay="):
        NoiseScale(decay=decay)


@pytest.mark.parametrize("state", [{}, {"decay": 0.9, "windows": 1, "trace": None, "square": 1.0}])
def test_a_wrong_state_is_named_and_changes_nothing(state: dict[str, Any]) -> None:
    noise = NoiseScale()
    window(noise, [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])], [4.0, 4.0])
    before = noise.state_dict()
    with pytest.raises(InvalidArgumentError, match=r"^state_dict="):
        noise.load_state_dict(state)
    assert noise.state_dict() == before


def test_a_sharded_parameter_is_refused() -> None:
    class Shard(nn.Parameter):
        device_mesh = "a mesh"

    noise, plain = NoiseScale(), nn.Parameter(torch.zeros(2))
    with pytest.raises(InvalidArgumentError, match="DTensor"):
        noise.watch([plain, Shard(torch.zeros(2))])
    assert not plain._backward_hooks
