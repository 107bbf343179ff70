"""Where batches come from: data sets with their longest samples, examples that are tiled, shuffled epochs."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch import DoesNotFitError, InvalidArgumentError, Workload, find
from autobatch.device.local import resolve_local
from autobatch.probe import finder
from autobatch.probe.search.within import Extent
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.probe.workload import data
from autobatch.probe.workload.data import DatasetBatches, batches_of
from autobatch.testing import FakeDevice
from autobatch.units import GIB, MIB


class Texts(Dataset[list[int]]):
    """Lists of tokens that count how often they are read."""

    def __init__(self, lengths: list[int]) -> None:
        self.texts = [[index] * length for index, length in enumerate(lengths)]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> list[int]:
        self.read.append(index)
        return self.texts[index]


def lengths_of(texts: list[list[int]]) -> list[int]:
    return [len(text) for text in texts]


def workload(sample: Any, **options: Any) -> Workload:
    return Workload(nn.Linear(3, 1), sample=sample, loss_fn=lambda output, batch: output.sum(), **options)


# A data set.


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.data())
def test_the_worst_batch_is_that_of_the_longest(lengths: list[int], drawn: st.DataObject) -> None:
    texts = Texts(lengths)
    kinds = [len, lengths, torch.tensor(lengths), None]
    batches = batches_of(texts, lengths_of, drawn.draw(st.sampled_from(kinds)))
    n = drawn.draw(st.integers(1, len(lengths)))
    assert isinstance(batches, DatasetBatches)
    longest = sorted(lengths, reverse=True)[:n]
    assert batches(n) == (longest if len(set(lengths)) > 1 else lengths[:n])
    assert batches.extent == Extent(samples=len(lengths), varies=len(set(lengths)) > 1)


def test_lengths_are_computed_once_and_the_longest_are_loaded_once() -> None:
    texts, measured = Texts([1, 5, 3, 4]), []

    def length(text: list[int]) -> int:
        measured.append(text)
        return len(text)

    batches = batches_of(texts, lengths_of, length)
    assert (texts.read, len(measured)) == ([0, 1, 2, 3], 4)
    texts.read.clear()
    assert [batches(2), batches(2), batches(4), batches(3)] == [[5, 4], [5, 4], [5, 4, 3, 1], [5, 4, 3]]
    assert texts.read == [1, 3, 2, 0]
    assert len(measured) == 4


def test_a_list_of_lengths_reads_no_sample() -> None:
    texts = Texts([1, 5, 3, 4])
    assert batches_of(texts, lengths_of, [9, 1, 8, 2])(2) == [1, 3]
    assert texts.read == [0, 2]


class Record(NamedTuple):
    x: torch.Tensor
    label: int


@dataclass
class Example:
    x: torch.Tensor
    note: str = ""


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.zeros(n, 2),
        lambda n: (torch.zeros(n), 1),
        lambda n: Record(torch.zeros(2, n), 1),
        lambda n: {"ids": list(range(n)), "label": 0},
        lambda n: Example(torch.zeros(n)),
        lambda n: torch.zeros(n).numpy(),
        lambda n: "a" * n,
    ],
    ids=["tensor", "tuple", "namedtuple", "mapping", "dataclass", "array", "text"],
)
def test_without_lengths_samples_are_measured(make: Any) -> None:
    samples = [make(n) for n in (2, 7, 3)]
    worst = batches_of(samples, lambda batch: batch, None)(1)
    assert worst[0] is samples[1] or worst[0] == samples[1]


def test_few_samples_of_a_large_data_set_of_one_size_are_measured() -> None:
    texts = Texts([3] * 100_000)
    batches = batches_of(texts, lengths_of, None)
    assert not batches.extent.varies
    assert len(texts.read) == data.SAME_SIZE
    assert max(texts.read) > 90_000


def test_not_all_samples_of_a_large_data_set_are_measured_and_those_measured_stand_for_the_others() -> None:
    texts = Texts([1 + index % 7 for index in range(6 * data.MEASURED)])
    batches = batches_of(texts, lengths_of, None)
    assert batches.extent == Extent(samples=6 * data.MEASURED, varies=True)
    assert len(texts.read) <= data.SAME_SIZE + data.MEASURED
    batch = batches(5000)
    assert len(batch) == 5000
    assert batch[0] == 7
    assert sum(batch) >= sum(sorted(lengths_of(texts.texts), reverse=True)[:5000]) * 0.5


def test_samples_are_collated_as_a_loader_does_unless_told_otherwise() -> None:
    x, y = batches_of(TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3)), None, None)(2)
    assert torch.equal(x, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(y, torch.tensor([0, 1]))


def test_a_collate_function_that_takes_samples_apart_changes_nothing_of_the_caller_s() -> None:
    samples = [{"ids": [1] * n, "pair": ([n], n)} for n in (1, 3, 2)]
    before = pickle.dumps(samples)

    def takes_apart(batch: list[dict[str, Any]]) -> list[int]:
        found = [len(sample.pop("ids")) for sample in batch]
        for sample in batch:
            sample["pair"][0].append(0)
        return found

    batches = batches_of(samples, takes_apart, lambda sample: len(sample["ids"]))
    assert [batches(2), batches(2), sorted(batches.shuffled(0)(3))] == [[3, 2], [3, 2], [1, 2, 3]]
    assert pickle.dumps(samples) == before


@pytest.mark.parametrize(
    ("lengths", "n", "expected"),
    [
        ([10, 9, 8, 10, 3], 3, [9, 8, 3]),  # a tenth shorter, and longest first
        ([10, 9, 8, 10, 3], 5, [9, 8, 3, 9, 8]),  # as many as were asked for
        ([100, 99, 98, 100], 2, [99, 98]),  # where none is a tenth shorter, whatever is shorter
    ],
)
def test_a_batch_a_little_shorter(lengths: list[int], n: int, expected: list[int]) -> None:
    assert batches_of(Texts(lengths), lengths_of, len).shorter(n) == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([10, 9, 9, 10], [[9, 9], [10, 10], [10, 10]]), ([5, 5, 5], [[5, 5]] * 3)],
)
def test_a_trial_begins_a_little_shorter_where_lengths_differ(lengths: list[int], expected: list[list[int]]) -> None:
    seen: list[list[int]] = []

    def collated(texts: list[list[int]]) -> torch.Tensor:
        seen.append(lengths_of(texts))
        return torch.zeros(len(texts), 3)

    made = workload(Texts(lengths), collate_fn=collated, length=len)
    run_trial(made, resolve_local("cpu"), TrialRequest(batch_size=2, steps=3))
    assert seen == expected


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_a_shuffled_epoch_draws_every_sample_once_and_always_the_same(samples: int, n: int, seed: int) -> None:
    n = min(n, samples)
    batches = batches_of(Texts(list(range(samples))), lengths_of, len)
    draw, again = batches.shuffled(seed), batches.shuffled(seed)
    epoch = [draw(n) for _ in range(samples // n)]
    assert epoch == [again(n) for _ in range(samples // n)]
    drawn = [length for batch in epoch for length in batch]
    assert len(set(drawn)) == len(drawn) == n * (samples // n)
    assert len(draw(n)) == n


def test_shuffling_leaves_the_caller_s_random_numbers_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    batches_of(Texts(list(range(9))), lengths_of, len).shuffled(3)(4)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_data_set_trains_and_evaluates() -> None:
    sizes: list[int] = []
    made = workload(TensorDataset(torch.zeros(5, 3), torch.zeros(5)))
    made.model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    made.train_step(3)
    made.eval_step(4)
    made.train_step(2, made.shuffled(0))
    assert sizes == [3, 4, 2]
    assert made.data() == dict.fromkeys(("train", "eval"), Extent(samples=5, varies=False))


def test_what_evaluates_by_itself_is_not_bound_by_the_data_set() -> None:
    assert list(workload(TensorDataset(torch.zeros(5, 3)), evaluate=lambda n: None).data()) == ["train"]
    assert workload(lambda n: torch.zeros(n, 3)).data() == {}
    assert Workload.from_step(lambda n: None).data() == {}


# One example batch.


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 9])
def test_an_example_is_cut_or_tiled(n: int) -> None:
    example = {"x": torch.arange(6.0).view(3, 2), "pair": [torch.arange(3), "kept"], "scale": torch.tensor(2.0)}
    batch = batches_of(example, None, None)(n)
    picked = torch.arange(n) % 3
    assert torch.equal(batch["x"], example["x"][picked])
    assert torch.equal(batch["pair"][0], picked)
    assert batch["pair"][1] == "kept"
    assert batch["scale"] is example["scale"]
    assert batch["x"].untyped_storage().nbytes() == n * 2 * 4
    batch["x"].zero_()
    assert example["x"].sum() == 15


@pytest.mark.parametrize("n", [2, 4, 9])
def test_an_example_keeps_its_memory_format_and_its_gradients(n: int) -> None:
    example = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    batch = batches_of(example, None, None)(n)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.requires_grad
    assert batch.is_leaf


def test_a_batch_of_a_loader_is_an_example() -> None:
    batch = next(iter(DataLoader(TensorDataset(torch.zeros(8, 3), torch.zeros(8)), 4)))
    x, y = batches_of(batch, None, None)(6)
    assert (x.shape, y.shape) == ((6, 3), (6,))


# In a search.


def fake_step(device: FakeDevice, sample: Any, **options: Any) -> Workload:
    """A workload whose steps need what ``device`` says for the number of elements in a batch."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            device.step(x.numel())
            return self.weight.sum()

    return Workload(Model(), sample=sample, **options)


def padded(texts: list[list[int]]) -> torch.Tensor:
    return torch.zeros(len(texts), max(map(len, texts)))


def fixed_size(samples: int) -> TensorDataset:
    return TensorDataset(torch.zeros(samples, 1))


def test_a_data_set_caps_the_search() -> None:
    device = FakeDevice(16 * GIB, lambda n: n * MIB)
    result = find(fake_step(device, fixed_size(37)), device=device)
    assert (result.batch_size, result.proof, result.smallest_failure) == (37, "dataset", None)
    assert "the data set has no more samples" in result.conclusion
    assert max(device.steps) == 37
    assert [trial.history for trial in result.confirmation] == ["a fresh start", "smaller batches"]


@pytest.mark.parametrize(
    ("options", "answer", "proof"),
    [
        ({"max_batch_size": 20}, 20, "max_batch_size"),
        ({"max_batch_size": 37}, 37, "max_batch_size"),
        ({"max_batch_size": 100}, 37, "dataset"),
        ({"multiple_of": 8}, 32, "dataset"),
        ({"start": 64}, 37, "dataset"),
        ({"memory_limit": 10 * MIB, "headroom": 0}, 10, "next_size_failed"),
    ],
)
def test_the_caps_of_the_caller_and_of_the_data_set(options: dict[str, Any], answer: int, proof: str) -> None:
    device = FakeDevice(16 * GIB, lambda n: n * MIB)
    result = find(fake_step(device, fixed_size(37)), device=device, **options)
    assert (result.batch_size, result.proof) == (answer, proof)
    assert max(device.steps) <= 37


def test_a_data_set_too_small_for_the_rounding_says_so() -> None:
    device = FakeDevice(16 * GIB, lambda n: n * MIB)
    with pytest.raises(InvalidArgumentError, match=r"multiple_of=64: must be at most 37"):
        find(fake_step(device, fixed_size(37)), device=device, multiple_of=64)


@pytest.mark.slow
def test_lengths_that_differ_are_confirmed_in_shuffled_order_too() -> None:
    device = FakeDevice(GIB, lambda n: n * MIB)
    chance = random.Random(0)
    texts = Texts([chance.randint(1, 20) for _ in range(300)])
    result = find(fake_step(device, texts, collate_fn=padded, length=len), device=device, headroom=0, multiple_of=1)
    assert result.batch_size == 1024 // 20
    histories = [trial.history for trial in result.confirmation]
    assert histories[:2] == ["a fresh start", "smaller batches"]
    assert histories[2:] == [f"shuffled epoch {number}" for number in range(1, finder.SHUFFLES_AT_THE_EDGE + 1)]
    assert result.confirmation[-1].steps > 20
    assert "Samples differ in length: 20 shuffled orders ran, and without headroom another one may not." in result.notes


@pytest.mark.slow
def test_an_answer_that_does_not_survive_a_shuffled_epoch_is_stepped_down() -> None:
    # An allocator that has trouble with a batch of mixed lengths. The worst case has none.
    device = FakeDevice(GIB, lambda elements: elements * MIB + (GIB if elements % 10 and elements > 900 else 0))
    texts = Texts([9, 10] * 150)
    result = find(fake_step(device, texts, collate_fn=concatenated, length=len), device=device, headroom=0)
    assert 85 <= result.batch_size <= 97
    assert result.proof == "stepped_down"
    refused = [trial for trial in result.confirmation if not trial.fits]
    assert {trial.history for trial in refused} == {"shuffled epoch 1"}
    assert any("did not keep fitting" in note for note in result.notes)


def concatenated(texts: list[list[int]]) -> torch.Tensor:
    return torch.zeros(sum(map(len, texts)))


def test_evaluation_that_needs_more_is_not_blamed_on_training() -> None:
    device = FakeDevice(GIB, lambda n: n * MIB)
    made = fake_step(device, fixed_size(1000), evaluate=lambda n: device.step(4 * n), mode="both")
    result = find(made, device=device, headroom=0, multiple_of=1)
    assert (result.batch_size, result.proof) == (1000, "dataset")
    assert result.eval_batch_size == 256
    assert all(trial.fits for trial in result.trials if trial.mode == "train")


def test_evaluation_that_never_fits_says_that_it_is_evaluation() -> None:
    device = FakeDevice(GIB, lambda n: n * MIB)
    made = fake_step(device, fixed_size(100), evaluate=lambda n: device.step(2000), mode="both")
    with pytest.raises(DoesNotFitError, match=r"^an evaluation of batch 1 does not fit"):
        find(made, device=device)


def test_an_error_of_evaluation_flies_unchanged() -> None:
    def evaluate(n: int) -> None:
        raise LookupError("no such split")

    device = FakeDevice(GIB, lambda n: n * MIB)
    with pytest.raises(LookupError, match="no such split"):
        find(fake_step(device, fixed_size(100), evaluate=evaluate, mode="both"), device=device)


# Bad input.


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 9


class WithoutLength(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


BAD_INPUT = [
    ({"sample": fixed_size(0)}, "sample", "0 samples.*not empty"),
    ({"sample": [], "collate_fn": padded}, "sample", "0 samples.*not empty"),
    ({"sample": Stream()}, "sample", "samples by number"),
    ({"sample": StreamWithLength(), "collate_fn": padded}, "sample", "samples by number"),
    ({"sample": WithoutLength()}, "sample", "samples by number"),
    ({"sample": iter([1])}, "sample", "a function of n"),
    ({"sample": "imagenet"}, "sample", "a function of n"),
    ({"sample": {"note": "no tensors"}}, "sample", "a function of n"),
    ({"sample": torch.tensor(1.0)}, "sample", "a function of n"),
    ({"sample": DataLoader(fixed_size(3))}, "sample", r"loader\.dataset"),
    ({"sample": (torch.zeros(2, 3), torch.zeros(3))}, "sample", r"\[2, 3\].*one size along dim 0"),
    ({"sample": (torch.zeros(0, 3), torch.zeros(0))}, "sample", "at least one"),
    ({"sample": lambda n: n, "collate_fn": padded}, "collate_fn", "unless sample is a data set"),
    ({"sample": lambda n: n, "length": len}, "length", "unless sample is a data set"),
    ({"sample": torch.zeros(3, 3), "length": [1, 2, 3]}, "length", "unless sample is a data set"),
    ({"sample": fixed_size(3), "collate_fn": 3}, "collate_fn", "a function"),
    ({"sample": fixed_size(3), "length": 3}, "length", "a function of one sample"),
    ({"sample": fixed_size(3), "length": "column"}, "length", "a function of one sample"),
    ({"sample": fixed_size(3), "length": [1, 2]}, "length", "2 lengths.*3"),
    ({"sample": fixed_size(3), "length": [1, -2, 3]}, "length", r"-2.*sample 1"),
    ({"sample": fixed_size(3), "length": [1, 2, float("nan")]}, "length", r"nan.*sample 2"),
    ({"sample": fixed_size(3), "length": [1, float("inf"), 2]}, "length", r"inf.*sample 1"),
    ({"sample": fixed_size(3), "length": lambda sample: None}, "length", r"None.*sample 0"),
    ({"keep_outputs": -1}, "keep_outputs", "whole number"),
    ({"keep_outputs": True}, "keep_outputs", "whole number"),
    ({"ema": nn.Linear(1, 1)}, "ema", "update_parameters"),
    ({"ema": 0.99}, "ema", "update_parameters"),
]


@pytest.mark.parametrize(("change", "argument", "message"), BAD_INPUT)
def test_bad_input_is_named(change: dict[str, Any], argument: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"(?s)^{argument}=.*{message}") as caught:
        workload(**{"sample": lambda n: torch.zeros(n, 3), **change})
    assert len(str(caught.value)) < 300


def test_a_length_function_that_fails_raises_its_own_error_and_says_at_which_sample() -> None:
    def length(text: list[int]) -> int:
        return {1: 1, 5: 5}[len(text)]

    with pytest.raises(KeyError, match="3") as caught:
        batches_of(Texts([1, 5, 3]), None, length)
    assert caught.value.__notes__ == ["in length= for sample 2 of the data set"]
    assert pickle.loads(pickle.dumps(caught.value)).__notes__ == caught.value.__notes__


def test_a_data_set_that_fails_raises_its_own_error() -> None:
    class Broken(Texts):
        def __getitem__(self, index: int) -> list[int]:
            raise OSError("file 7 is gone")

    with pytest.raises(OSError, match="file 7 is gone"):
        batches_of(Broken([1, 2]), None, None)
