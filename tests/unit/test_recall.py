"""find(cache=...): when an answer is remembered, when it is confirmed, and when it counts no more."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autobatch import BatchSizeResult, InvalidArgumentError, Workload, find
from autobatch.device.host import HostDevice
from autobatch.errors import AutobatchWarning
from autobatch.probe.cache import ResultCache, default_folder
from autobatch.probe.search.arguments import check_count
from autobatch.probe.workload import signature
from autobatch.probe.workload.signature import signature_of
from autobatch.testing import FakeDevice
from autobatch.units import GIB, MIB, parse_bytes
from tests.workloads import small


class Net(nn.Sequential):
    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, 1))
        self.checkpointing = False


class Bench:
    """A fake GPU and a workload on it that can be changed from one search to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.capacity_bytes, self.sample_bytes = folder, 16 * GIB, 100 * MIB
        self.device: FakeDevice

    def workload(self, width: int = 4, samples: int = 4, **options: Any) -> Workload:
        def sample(n: int) -> torch.Tensor:
            self.device.step(n)
            return torch.zeros(n, samples)

        model = Net(width)
        return Workload(
            model, torch.optim.AdamW(model.parameters()), lambda output, _: output.mean(), sample, **options
        )

    def find(self, workload: Workload | None = None, **options: Any) -> BatchSizeResult:
        self.device = FakeDevice(64 * GIB, lambda n: 2 * GIB + n * self.sample_bytes)
        self.device._limit_bytes = self.capacity_bytes  # others have the rest
        options = {"multiple_of": 1, "headroom": 0, "cache": self.folder, **options}
        return find(workload or self.workload(), device=self.device, **options)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "answers")


def is_recalled(result: BatchSizeResult) -> bool:
    return any(note.startswith("From the cache: found on ") for note in result.notes)


def test_a_hit_is_confirmed_by_one_trial_and_says_so(bench):
    first, second = bench.find(), bench.find()
    assert not is_recalled(first)
    assert is_recalled(second)
    assert (second.batch_size, second.proof, second.smallest_failure) == (143, "next_size_failed", 144)
    assert [(t.batch_size, t.fits, t.steps) for t in second.trials] == [(143, True, 20)]
    assert (second.trial_count, second.confirmation) == (1, ())
    assert second.environment == first.environment
    assert set(bench.device.steps) == {1, 143}  # the one is the sample that was looked at


def test_without_a_cache_nothing_is_read_or_kept(bench):
    bench.find(cache=None)
    assert not bench.folder.exists()
    assert not default_folder().exists() or not list(default_folder().iterdir())
    bench.find(cache=True)
    assert len(ResultCache(default_folder()).entries()) == 1


def test_an_answer_that_does_not_fit_any_more_is_dropped_and_searched_below(bench):
    bench.find()
    bench.sample_bytes = 101 * MIB
    result = bench.find()
    assert not is_recalled(result)
    assert (result.batch_size, result.smallest_failure) == (141, 142)
    assert "The cache had an answer of 143, which does not fit any more; searched anew." in result.notes
    assert [t.batch_size for t in result.trials].count(143) == 1  # the trial of the cache is not repeated
    assert len(result.trials) < 6
    assert is_recalled(again := bench.find())
    assert again.batch_size == 141


def test_when_more_memory_is_free_the_answer_is_only_a_first_guess(bench):
    bench.find()
    bench.capacity_bytes = 32 * GIB
    result = bench.find()
    assert not is_recalled(result)
    assert result.trials[0].batch_size == 286
    assert result.batch_size == 30 * GIB // (100 * MIB)


def test_when_a_little_more_memory_is_free_the_answer_holds(bench):
    bench.find()
    bench.capacity_bytes += 32 * MIB
    assert is_recalled(bench.find())


def test_when_less_memory_is_free_a_trial_decides(bench):
    bench.find()
    bench.capacity_bytes -= GIB
    result = bench.find()
    assert not is_recalled(result)
    assert result.batch_size == 13 * GIB // (100 * MIB)


@pytest.mark.parametrize(
    "option",
    [
        {"headroom": 0.1},
        {"multiple_of": 2},
        {"max_batch_size": 99},
        {"steps": 4},
        {"avoid_oom": True},
        {"memory_limit": "8GiB"},
    ],
    ids=str,
)
def test_an_option_that_changes_the_answer_is_another_question(bench, option):
    bench.find()
    assert not is_recalled(bench.find(**option))
    assert is_recalled(bench.find(**option))
    assert is_recalled(bench.find())


@pytest.mark.parametrize("option", [{"growth": 3.0}, {"time_limit_s": 60.0}, {"first_guess": 7}], ids=str)
def test_an_option_that_only_changes_the_way_is_not(bench, option):
    bench.find()
    assert is_recalled(bench.find(**option))


def test_a_search_that_ran_out_of_time_is_not_kept(bench):
    assert bench.find(time_limit_s=1e-9).proof == "time_limit"
    assert not is_recalled(bench.find())


def test_both_modes_are_confirmed(bench):
    first = bench.find(bench.workload(mode="both"))
    second = bench.find(bench.workload(mode="both"))
    assert is_recalled(second)
    assert (second.batch_size, second.eval_batch_size) == (first.batch_size, first.eval_batch_size)
    assert [t.mode for t in second.trials] == ["train", "eval"]


def test_of_a_step_function_nothing_is_kept_and_that_is_said(bench):
    bench.device = FakeDevice(bench.capacity_bytes, lambda n: n * GIB)
    result = find(bench.device.step, device=bench.device, cache=bench.folder)
    assert "Not kept in the cache: nothing tells one step function from another." in result.notes
    assert not bench.folder.exists()


def test_samples_that_cannot_be_made_are_met_by_the_search_itself(bench):
    workload = bench.workload()
    workload.sample = lambda n: {}["column"]
    with pytest.raises(KeyError, match="column"):
        bench.find(workload)


def test_a_corrupt_file_is_a_warning_and_overwritten(bench):
    bench.find()
    (path,) = bench.folder.glob("*.json")
    path.write_bytes(b"\0")
    with pytest.warns(AutobatchWarning, match="is passed over"):
        assert not is_recalled(bench.find())
    assert is_recalled(bench.find())


def test_a_folder_that_cannot_be_written_is_a_warning(bench, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.warns(AutobatchWarning, match="cannot be written"):
        assert bench.find(cache=tmp_path / "file" / "answers").batch_size == 143


def test_a_wrong_cache_is_refused_before_anything_is_touched(bench):
    with pytest.raises(InvalidArgumentError, match="cache=3: must be None"):
        bench.find(cache=3)
    with pytest.raises(InvalidArgumentError, match="first_guess=0: must be a positive"):
        bench.find(first_guess=0)
    assert bench.device.steps == []


def test_a_first_guess_is_where_the_search_begins(bench):
    result = bench.find(first_guess=140)
    assert (result.batch_size, result.trials[0].batch_size) == (143, 140)
    assert 2 in bench.device.steps  # before the confirmation after smaller batches, none of which the search has run


def test_a_guess_that_does_not_keep_fitting_is_stepped_down(bench):
    def lose_memory(trial: Any) -> None:
        if trial.batch_size == 144:  # the search's last
            bench.device._limit_bytes = int(0.95 * bench.capacity_bytes)

    result = bench.find(first_guess=143, on_trial=lose_memory)
    assert result.proof in ("next_size_failed", "stepped_down")
    assert 130 <= result.batch_size < 140


def test_both_modes_are_confirmed_where_the_process_that_tried_one_is_still_there(monkeypatch, tmp_path):
    """As on a GPU: its confirmation begins in the process that is there."""
    kept: dict[str, Any] = {"device": "cpu", "memory_limit": 64 * MIB, "max_batch_size": 2, "cache": tmp_path}
    isolation = HostDevice.isolation
    monkeypatch.setattr(HostDevice, "isolation", lambda self: dataclasses.replace(isolation(self), anew=False))
    assert not is_recalled(find(small.both, **kept))
    recalled = find(small.both, **kept)
    assert is_recalled(recalled)
    assert [trial.mode for trial in recalled.trials] == ["train", "eval"]


@pytest.mark.slow
def test_the_signature_is_made_where_the_workload_lives(tmp_path):
    """In a child process: a hit starts no search there, and a changed workload is another."""
    kept: dict[str, Any] = {"device": "cpu", "memory_limit": 64 * MIB, "max_batch_size": 2, "cache": tmp_path}
    assert not is_recalled(find(small.build, **kept))
    recalled = find(small.build, **kept)
    assert is_recalled(recalled)
    assert [(t.batch_size, t.history) for t in recalled.trials] == [(2, "a fresh start")]
    assert not is_recalled(find(small.both, **kept))


class TestSignature:
    def text(self, workload: Workload, n: int = 1) -> str | None:
        return signature_of(workload, n).text

    @pytest.fixture
    def make(self, bench):
        bench.device = FakeDevice(bench.capacity_bytes, lambda n: 0)
        return bench.workload

    def test_it_is_the_same_for_the_same_workload_also_after_training(self, make):
        workload = make(precision="bf16", accumulate=True)
        before = self.text(workload)
        workload.begin()
        workload.train_step(2)
        workload.optimizer.param_groups[0]["lr"] = 0.5
        workload.forget()
        assert self.text(workload) == before == self.text(make(precision="bf16", accumulate=True))

    @pytest.mark.parametrize(
        "options",
        [
            {"width": 5},
            {"samples": 4, "mode": "eval"},
            {"precision": "bf16"},
            {"accumulate": True},
            {"max_grad_norm": 1.0},
        ],
        ids=str,
    )
    def test_options_tell_workloads_apart(self, make, options):
        assert self.text(make(**options)) != self.text(make())

    def test_samples_tell_workloads_apart(self, make):
        workload = make()
        workload.sample = lambda n: torch.zeros(n, 4, dtype=torch.float64)
        wider = make()
        wider.sample = lambda n: {"x": torch.zeros(n, 4)}
        assert len({self.text(make()), self.text(workload), self.text(wider), self.text(make(samples=5))}) == 4

    def test_settings_of_modules_and_optimizers_tell_workloads_apart(self, make):
        checkpointed, compiled, frozen, plain, slow = make(), make(), make(), make(), make()
        checkpointed.model.checkpointing = True
        compiled.model.compile()
        frozen.model[0].requires_grad_(False)
        plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1)
        slow.optimizer = torch.optim.SGD(slow.model.parameters(), lr=0.1, momentum=0.9)
        workloads = (make(), checkpointed, compiled, frozen, plain, slow)
        assert len({self.text(workload) for workload in workloads}) == len(workloads)

    def test_the_allocators_settings_tell_workloads_apart(self, make, monkeypatch):
        before = self.text(make())
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        assert self.text(make()) != before

    def test_our_own_code_is_no_part_of_a_workload(self, make):
        """Else every kept answer of a built-in target were lost with any change of ours."""
        workload = make()
        workload.sample, workload.loss_fn = partial(parse_bytes, "1"), check_count
        assert not {"units.py", "arguments.py"} & {name for name, _ in signature._sources(workload)}

    def test_the_code_of_the_model_tells_workloads_apart(self, tmp_path, monkeypatch):
        path, texts = tmp_path / "net_of_mine.py", []
        for body in ("x", "x", "x * 1"):
            path.write_text(
                f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return {body}\n"
            )
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            texts.append(self.text(Workload(module.Net(), sample=torch.zeros)))
        assert texts[0] == texts[1] != texts[2]
