"""Sweeps: what may be swept, where each search begins, what is shown and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from autobatch.cli import main
from autobatch.errors import DoesNotFitError
from autobatch.probe import finder
from autobatch.probe.search.sweep import next_guess, sample_bytes
from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial
from autobatch.testing import FakeDevice
from autobatch.units import GIB, MIB
from autobatch.virtual import resolve

CAPACITY, HELD = 16 * GIB, 2 * GIB


def trial(size: int, per_sample: int, outcome: Outcome = Outcome.FITS) -> Trial:
    peak = HELD + size * per_sample
    return Trial(
        batch_size=size,
        outcome=outcome,
        measurement=Measurement(peak_allocated_bytes=peak, peak_reserved_bytes=peak, capacity_bytes=CAPACITY),
    )


def found(per_sample: int, *, smaller: bool = True) -> BatchSizeResult:
    """What a search finds where a sample takes so many bytes."""
    size = (CAPACITY - HELD) // per_sample
    trials = (trial(1, per_sample), trial(size, per_sample)) if smaller else (trial(size, per_sample),)
    return BatchSizeResult(
        batch_size=size,
        proof="next_size_failed",
        smallest_failure=size + 1,
        trials=(*trials, trial(size + 1, per_sample, Outcome.OOM)),
        environment={"device": "fake device", "kind": "fake"},
    )


class TestNextGuess:
    def test_the_first_has_none(self):
        assert next_guess("seq_len", [], 512) is None

    def test_the_second_assumes_the_usual_growth(self):
        assert next_guess("seq_len", [(512, found(10 * MIB))], 1024) == pytest.approx(1433 / 2, abs=1)
        assert next_guess("image_size", [(112, found(10 * MIB))], 224) == pytest.approx(1433 / 4, abs=1)

    def test_the_third_follows_what_two_have_shown(self):
        # A sample that grows with the square of its length, as attention without a fused kernel does.
        searches = [(512, found(10 * MIB)), (1024, found(40 * MIB))]
        assert next_guess("seq_len", searches, 2048) == pytest.approx((CAPACITY - HELD) / (160 * MIB), abs=1)

    def test_without_slopes_the_answers_tell_the_growth(self):
        searches = [(512, found(10 * MIB, smaller=False)), (1024, found(40 * MIB, smaller=False))]
        assert sample_bytes(searches[0][1]) is None
        assert next_guess("seq_len", searches, 2048) == pytest.approx((CAPACITY - HELD) / (160 * MIB), abs=1)

    def test_the_nearest_value_leads(self):
        searches = [(512, found(10 * MIB)), (4096, found(80 * MIB))]
        assert next_guess("seq_len", searches, 600) == pytest.approx(1433 * 512 / 600, abs=2)

    def test_it_is_never_below_one_sample(self):
        assert next_guess("image_size", [(32, found(10 * GIB))], 32_768) == 1

    @given(
        st.lists(
            st.tuples(st.integers(1, 10**6), st.integers(1, 10**10)), min_size=1, max_size=5, unique_by=lambda p: p[0]
        ),
        st.integers(1, 10**6),
    )
    def test_it_is_a_size_whatever_was_found(self, pairs, value):
        guess = next_guess("seq_len", [(at, found(per_sample)) for at, per_sample in pairs], value)
        assert isinstance(guess, int)
        assert guess >= 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What find() was called with; a token takes 10 MiB, and from 2048 tokens on nothing fits."""
    calls: list[dict[str, Any]] = []

    def find(workload: Any, **options: Any) -> BatchSizeResult:
        calls.append({"workload": workload, **options})
        length = workload.options.seq_len
        if length >= 2048:
            raise DoesNotFitError("batch 1 does not fit")
        result = found(length * 10 * MIB)
        for one in result.trials:
            options["on_trial"](one)
        return result

    monkeypatch.setattr(finder, "find", find)
    monkeypatch.setattr(resolve, "resolve_device", lambda name, **rest: FakeDevice(CAPACITY, lambda n: n * GIB))
    return calls


def run(*arguments: object):
    return CliRunner().invoke(main, ["probe", *map(str, arguments)])


class TestCommand:
    def test_the_largest_batch_at_each_value_and_the_frontier(self, asked, tmp_path: Path):
        path = tmp_path / "sweep.json"
        shown = run("hf:gpt2", "--sweep", "seq_len=16,32,4096", "--json", path)
        assert shown.exit_code == 0, shown.output
        assert [call["workload"].options.seq_len for call in asked] == [16, 32, 4096]
        assert [call["first_guess"] for call in asked] == [None, 44, 1]
        lines = [line.split() for line in shown.stdout.splitlines()]
        assert lines[-4:-1] == [
            ["seq_len", "largest", "batch", "peak", "trials", "failures"],
            ["16", "89", "15.91", "GiB", "3", "1"],
            ["32", "44", "15.75", "GiB", "3", "1"],
        ]
        assert lines[-1] == ["4096", "none"]
        written = json.loads(path.read_text())
        assert written["sweep"] == "seq_len"
        assert [(row["seq_len"], row["batch_size"]) for row in written["results"]] == [(16, 89), (32, 44), (4096, None)]
        assert BatchSizeResult.from_json(json.dumps(written["results"][0]["result"])).batch_size == 89
        assert written["results"][2]["does_not_fit"] == "batch 1 does not fit"

    def test_where_nothing_fits_at_any_value_the_code_says_so(self, asked):
        shown = run("hf:gpt2", "--sweep", "seq_len=2048,4096")
        assert shown.exit_code == 1
        assert "not even one sample fits at any value of seq_len=2048,4096" in shown.stderr

    def test_what_was_found_before_a_search_that_fails_is_shown(self, asked, monkeypatch: pytest.MonkeyPatch):
        search = finder.find

        def find(workload, **options):
            if workload.options.seq_len == 64:
                raise KeyError("column 7")
            return search(workload, **options)

        monkeypatch.setattr(finder, "find", find)
        shown = run("hf:gpt2", "--sweep", "seq_len=16,32,64,128")
        assert shown.exit_code == 4
        lines = shown.stdout.splitlines()
        assert "Ended at seq_len=64. Found before:" in lines
        assert [line.split()[:2] for line in lines[-2:]] == [["16", "89"], ["32", "44"]]

    def test_the_frontier_is_drawn(self, asked, tmp_path: Path):
        pytest.importorskip("matplotlib")
        assert run("hf:gpt2", "--sweep", "seq-len=16,32", "--plot", tmp_path / "sweep.png").exit_code == 0
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
        assert all(call["cache"] for call in asked)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--sweep", "seq_len"], "must begin with seq_len= or image_size=, as in"),
            (["--sweep", "width=1,2"], "must begin with seq_len= or image_size=, as in"),
            (["--sweep", "seq_len="], "positive whole numbers"),
            (["--sweep", "seq_len=512,"], "positive whole numbers"),
            (["--sweep", "seq_len=512,0"], "positive whole numbers"),
            (["--sweep", "seq_len=512,-1"], "positive whole numbers"),
            (["--sweep", "seq_len=1e3"], "positive whole numbers"),
            (["--sweep", "seq_len=512,1024,512"], "has 512 more than once"),
            (["--sweep", "seq_len=512", "--seq-len", "64"], "--seq-len 64: must be left out, for --sweep"),
            (["--sweep", "seq_len=8", "--sweep", "image_size=9"], "seq_len=8 and image_size=9 must be one sweep"),
        ],
    )
    def test_a_sweep_that_is_none_is_refused_before_anything_runs(self, asked, arguments, says):
        shown = run("hf:gpt2", *arguments)
        assert (shown.exit_code, asked) == (2, [])
        assert says in shown.stderr
        assert len(shown.stderr.splitlines()) == 1

    def test_an_option_that_the_target_does_not_have_is_refused(self, asked):
        shown = run("torchvision:resnet18", "--sweep", "seq_len=512,1024")
        assert (shown.exit_code, asked) == (2, [])
        assert shown.stderr.startswith(
            "Error: --sweep seq_len=512,1024: must be left out: it means nothing to torchvision"
        )


class TestPlotOption:
    def test_a_picture_is_drawn_of_a_search_and_not_of_the_cache(self, asked, tmp_path: Path):
        pytest.importorskip("matplotlib")
        assert run("hf:gpt2", "--seq-len", 16, "--plot", tmp_path / "plot.svg").exit_code == 0
        assert (tmp_path / "plot.svg").read_bytes().startswith(b"<?xml")
        assert [call["cache"] for call in asked] == [None]

    @pytest.mark.parametrize("name", ["plot.jpg", "missing/plot.png"])
    def test_what_cannot_be_drawn_is_refused_before_anything_runs(self, asked, tmp_path: Path, name: str):
        pytest.importorskip("matplotlib")
        shown = run("hf:gpt2", "--plot", tmp_path / name)
        assert (shown.exit_code, asked) == (2, [])
        assert "--plot" in shown.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "cache"), [([], True), (["--cache"], True), (["--no-cache"], None)])
def test_the_cache_is_used_unless_told_otherwise(asked, flag, cache):
    assert run("hf:gpt2", "--seq-len", 16, *flag).exit_code == 0
    assert asked[0]["cache"] is cache
