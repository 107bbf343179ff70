"""tune() itself: which integration it takes, what it refuses before anything is touched, and exact plans."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

import autobatch
from autobatch.errors import (
    AutobatchWarning,
    InvalidArgumentError,
    MissingDependencyError,
    UnsupportedTrainerError,
)
from autobatch.integrations import sizes, tuning
from autobatch.integrations.loaders import Source, set_batch_size, source_of
from autobatch.integrations.sizes import exact_plan, searched, share_of
from autobatch.integrations.workload import TrainerWorkload
from autobatch.probe.workload.signature import signature_of

LIBRARIES = ("transformers", "lightning", "pytorch_lightning", "accelerate", "ignite")


@given(
    share=st.integers(1, 5000), fits=st.integers(1, 5000), world_size=st.integers(1, 16), whole=st.sampled_from([0, 1])
)
def test_a_plan_is_exact_for_every_batch_that_fits_and_every_number_of_ranks(
    share: int, fits: int, world_size: int, whole: int
) -> None:
    effective = share * world_size if whole else None
    plan = exact_plan(effective, fits, world_size)
    assert plan.micro_batch_size <= fits
    assert plan.remainder == 0
    assert plan.micro_batch_size * plan.steps * world_size == plan.effective_batch_size
    if effective is None:
        assert (plan.micro_batch_size, plan.steps) == (fits, 1)
        return
    assert plan.effective_batch_size == effective
    # No fewer steps are possible: a larger micro-batch that fits would not divide.
    assert all(share % size for size in range(plan.micro_batch_size + 1, min(fits, share) + 1))


@given(effective=st.integers(1, 10_000), world_size=st.integers(1, 16))
def test_a_rank_s_share_is_exact_or_refused_with_what_would_do(effective: int, world_size: int) -> None:
    if effective % world_size == 0:
        assert share_of(effective, world_size) == effective // world_size
        return
    below, above = effective // world_size * world_size, (effective // world_size + 1) * world_size
    with pytest.raises(UnsupportedTrainerError) as refused:
        share_of(effective, world_size)
    said = str(refused.value)
    assert f"effective_batch_size={effective}: must be a multiple of {world_size}" in said
    assert said.endswith(f"nearest: {f'{below} or ' if below else ''}{above}")


def test_without_an_effective_batch_there_is_no_share() -> None:
    assert share_of(None, 3) is None


@pytest.mark.parametrize("share", [129, 509])
def test_a_window_that_is_no_round_number_is_tried_as_a_whole(share: int) -> None:
    """Of permitted sizes the next below might divide nothing: 509 is prime, and 504 fits."""
    model = nn.Linear(2, 2)
    workload = TrainerWorkload(model, source_of(loader(share)), lambda batches: None, share=share)
    _, plan = searched(workload, effective_batch_size=share, world_size=1, find_options={"start": share})
    assert (plan.micro_batch_size, plan.steps) == (share, 1)


def test_a_window_without_a_divisor_near_what_fits_is_told_of() -> None:
    workload = TrainerWorkload(nn.Linear(2, 2), source_of(loader(96)), lambda batches: None, share=97)
    options = {"max_batch_size": 50, "start": 50}
    result, plan = searched(workload, effective_batch_size=97, world_size=1, find_options=options)
    assert (plan.micro_batch_size, plan.steps) == (1, 97)
    assert any(note.startswith("97 has no divisor near 50, which fit") for note in result.notes)
    assert result.environment["accumulation"]["steps"] == 97
    assert result.environment["effective_batch_size"] == 97


def loader(samples: int = 64, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(samples * 2.0).view(samples, 2)), **{"batch_size": 4, **options})


class Stream(IterableDataset[int]):
    def __iter__(self):
        return iter(range(8))


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Lengths(BatchSampler):
    """Cuts batches by a rule of its own."""

    def __iter__(self):
        yield from ([0, 1, 2], [3])


class Own:
    def __iter__(self):
        yield [0, 1]

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1, 2], "the training loader is a list; it must be a torch DataLoader"),
        (DataLoader(Stream()), "the training loader reads Stream, a stream, which does not show its longest samples"),
        (DataLoader(Endless(), sampler=range(4)), "the training loader reads Endless, which has no length"),
        (loader(batch_size=None), "the training loader has batch_size=None: its samples are not put into batches"),
        (
            DataLoader(range(8), batch_sampler=Lengths(SequentialSampler(range(8)), 3, False)),
            "the training loader has a batch sampler of its own, Lengths, which cannot be given a batch size",
        ),
        (DataLoader(range(8), batch_sampler=Own()), "the training loader has a batch sampler of its own, Own"),
    ],
)
def test_a_loader_that_cannot_be_given_a_batch_size_is_refused(data: Any, said: str) -> None:
    with pytest.raises(UnsupportedTrainerError) as refused:
        source_of(data)
    assert said in str(refused.value)


def test_the_source_of_a_loader_is_what_it_draws_from_and_nothing_is_drawn() -> None:
    rows = loader(shuffle=True)
    before = torch.get_rng_state()
    assert source_of(rows) == Source(rows.dataset, rows.collate_fn, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_size_is_set_in_place_and_all_else_stays(workers: int) -> None:
    rows = loader(num_workers=workers, persistent_workers=workers > 0)
    sampler, batch_sampler = rows.sampler, rows.batch_sampler
    assert [len(batch) for (batch,) in rows] == [4] * 16
    set_batch_size(rows, 24)
    assert (rows.sampler, rows.batch_sampler, rows.batch_size) == (sampler, batch_sampler, 24)
    assert len(rows) == 3
    drawn = [batch for (batch,) in rows]
    assert [len(batch) for batch in drawn] == [24, 24, 16]
    assert torch.equal(torch.cat(drawn), rows.dataset.tensors[0])
    with pytest.raises(ValueError, match="attribute should not be set"):
        rows.batch_size = 3


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("splits", "drop_last", "evens"), [(0, 0, 1), (0, 1, 1), (0, 0, 0), (1, 0, 1), (1, 0, 0)])
def test_a_loader_that_accelerate_prepared_draws_as_one_that_was_made_so(
    ranks: int, splits: int, drop_last: int, evens: int, request: pytest.FixtureRequest
) -> None:
    """Its own batch sampler has noted the size when it was made."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.PartialState(cpu=True)
    request.addfinalizer(accelerate.PartialState._reset_state)
    prepare = accelerate.data_loader.prepare_data_loader

    def prepared(rank: int, size: int) -> Any:
        rows = loader(50, batch_size=size * (ranks if splits else 1), drop_last=bool(drop_last))
        options = {"num_processes": ranks, "process_index": rank, "split_batches": bool(splits)}
        return prepare(rows, even_batches=bool(evens), **options)

    for rank in range(ranks):
        changed, made = prepared(rank, 2), prepared(rank, 7)
        assert source_of(changed).batch_size == 2 * (ranks if splits else 1)
        set_batch_size(changed, 7 * (ranks if splits else 1))
        assert (len(changed), changed.total_batch_size) == (len(made), made.total_batch_size)
        ours, theirs = [batch for (batch,) in changed], [batch for (batch,) in made]
        assert [len(batch) for batch in ours] == [len(batch) for batch in theirs]
        assert torch.equal(torch.cat(ours), torch.cat(theirs))


class Foreign:
    """A trainer that nobody here knows."""


class Plugged:
    """An integration of somebody else's."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def handles(self, trainer: Any) -> bool:
        return isinstance(trainer, Foreign)

    def tune(self, trainer: Any, model: Any, data: Any, **options: Any) -> Any:
        self.asked.append((trainer, model, data, options))
        return "tuned"


class Broken(Plugged):
    def handles(self, trainer: Any) -> bool:
        raise KeyError("it does not know itself")


class Elsewhere(Plugged):
    def handles(self, trainer: Any) -> bool:
        return False


PLUGGED, BROKEN, ELSEWHERE = Plugged(), Broken(), Elsewhere()


def plug_in(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    found = [EntryPoint(name, value, tuning.GROUP) for name, value in values.items()]

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [point for point in found if point.group == group]

    monkeypatch.setattr(tuning, "entry_points", entry_points)
    PLUGGED.asked.clear()


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, other=f"{__name__}:ELSEWHERE", theirs=f"{__name__}:PLUGGED")
    trainer = Foreign()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autobatch.tune(trainer, "model", "data", effective_batch_size=8, headroom=0.1) == "tuned"
    options = {"optimizer": None, "loss_fn": None, "effective_batch_size": 8, "headroom": 0.1}
    assert PLUGGED.asked == [(trainer, "model", "data", options)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "no_such_module_of_anybody:it",
            "the plug-in broken = no_such_module_of_anybody:it is skipped: ModuleNotFound",
        ),
        (f"{__name__}:NOTHING", "is skipped: AttributeError"),
        (f"{__name__}:BROKEN", "is skipped: KeyError: 'it does not know itself'"),
    ],
)
def test_a_broken_plug_in_is_reported_and_skipped(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    plug_in(monkeypatch, broken=value, theirs=f"{__name__}:PLUGGED")
    with pytest.warns(AutobatchWarning) as warned:
        assert autobatch.tune(Foreign()) == "tuned"
    assert len(warned) == 1
    assert said in str(warned[0].message)


def test_a_plug_in_does_not_take_over_a_trainer_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ignite = pytest.importorskip("ignite.engine")
    plug_in(monkeypatch, greedy=f"{__name__}:PLUGGED")
    monkeypatch.setattr(Plugged, "handles", lambda self, trainer: True)
    with pytest.raises(InvalidArgumentError, match="must be the loader that the engine will run over"):
        autobatch.tune(ignite.Engine(lambda engine, batch: None))


def test_an_unknown_trainer_is_told_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch)
    with pytest.raises(UnsupportedTrainerError) as refused:
        autobatch.tune(Foreign())
    said = str(refused.value)
    assert said.startswith(f"no integration knows {__name__}.Foreign. Known: ")
    for known in ("transformers.Trainer", "lightning.Trainer", "accelerate.Accelerator", "ignite.engine.Engine"):
        assert known in said
    assert "'autobatch.trainers'" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size=0: must be a positive whole number"),
        ({"effective_batch_size": 8.0}, "effective_batch_size=8.0: must be a positive whole number"),
        ({"device": "cpu"}, "device='cpu': must be left out: of autobatch.find a trainer takes avoid_oom, cache"),
        ({"headrom": 0.1}, "headrom=0.1: must be left out: of autobatch.find"),
    ],
)
def test_options_are_checked_before_the_trainer_is_looked_at(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        autobatch.tune(Foreign(), **options)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("library", "extra"),
    [("transformers", "hf"), ("lightning", "lightning"), ("accelerate", "accelerate"), ("ignite", "ignite")],
)
def test_a_missing_library_names_the_extra_that_brings_it(
    library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in LIBRARIES]:
        monkeypatch.delitem(sys.modules, name)
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"autobatch.integrations.{library}", raising=False)
    # A trainer whose class says that it is of the library: as where an environment is there in part.
    trainer = types.new_class("Trainer", (), {}, lambda body: body.update(__module__=f"{library}.trainer"))()
    with pytest.raises(MissingDependencyError) as missing:
        autobatch.tune(trainer)
    assert f"{library} cannot be imported" in str(missing.value)
    assert str(missing.value).endswith(f"pip install 'autobatch-torch[{extra}]'")
    assert isinstance(missing.value, ImportError)


def test_importing_autobatch_and_tune_imports_none_of_the_libraries() -> None:
    code = (
        "import sys, autobatch\n"
        "autobatch.tune, autobatch.find, autobatch.Accumulator\n"
        f"found = sorted(set({LIBRARIES!r}) & set(sys.modules))\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "other",
    [
        {"share": 64},
        {"identity": ["bf16"]},
        {"stateful": [torch.optim.SGD([nn.Parameter(torch.ones(1))], momentum=0.9)]},
        {"holds_window": True},
    ],
)
def test_a_cache_tells_one_training_from_another(other: dict[str, Any]) -> None:
    model = nn.Linear(2, 1)

    def signature(**options: Any) -> str | None:
        known = {"stateful": [torch.optim.SGD([nn.Parameter(torch.ones(1))])], "share": 8, **options}
        source = Source([torch.ones(2)] * 4, torch.stack, 2)
        return signature_of(TrainerWorkload(model, source, print, **known), 2).text

    assert signature() == signature() is not None
    assert signature(**other) != signature()


def test_a_step_that_no_rank_can_try_alone_is_an_unsupported_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InvalidArgumentError("workload", "a live model in FullyShardedDataParallel", "a function that builds it")

    monkeypatch.setattr(sizes, "find", refuse)
    workload = TrainerWorkload(nn.Linear(2, 1), Source([torch.ones(2)] * 4, torch.stack, 2), print)
    with pytest.raises(UnsupportedTrainerError, match=r"it has a live model in Fully.*`autobatch probe -- COMMAND`"):
        sizes.searched(workload, effective_batch_size=None, world_size=1, find_options={})
