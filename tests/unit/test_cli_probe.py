"""``autobatch probe`` with a search that is acted: what reaches find(), what is shown, what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from autobatch.cli import main
from autobatch.cli.targets import HFTarget
from autobatch.probe import finder
from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial
from autobatch.testing import FakeDevice
from autobatch.units import GIB
from autobatch.virtual import resolve


def trial(size: int, outcome: Outcome, **rest: Any) -> Trial:
    measured = Measurement(
        peak_allocated_bytes=size * GIB, peak_reserved_bytes=size * GIB, capacity_bytes=10 * GIB, step_time_s=0.25
    )
    return Trial(batch_size=size, outcome=outcome, measurement=measured, duration_s=1.5, steps=3, **rest)


TRIALS = (trial(4, Outcome.FITS), trial(16, Outcome.OOM, message="CUDA out of memory"), trial(8, Outcome.FITS))
CONFIRMATION = (trial(8, Outcome.FITS, history="smaller batches"),)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What find() was called with; it answers 8."""
    calls: list[dict[str, Any]] = []

    def find(workload: Any, **options: Any) -> BatchSizeResult:
        calls.append({"workload": workload, **options})
        for one in (*TRIALS, *CONFIRMATION):
            options["on_trial"](one)
        return BatchSizeResult(
            batch_size=8,
            proof="next_size_failed",
            smallest_failure=16,
            trials=TRIALS,
            confirmation=CONFIRMATION,
            environment={"device": "fake device"},
            notes=("more would fit with expandable segments",),
            duration_s=6.0,
        )

    monkeypatch.setattr(finder, "find", find)
    monkeypatch.setattr(resolve, "resolve_device", lambda name, **rest: FakeDevice(16 * GIB, lambda n: n * GIB))
    return calls


def run(*arguments: str, color: bool = False):
    return CliRunner().invoke(main, ["probe", *arguments], color=color)


class TestOptions:
    def test_every_option_reaches_the_search_or_the_target(self, asked):
        line = (
            "hf:gpt2 --memory-limit 10GiB --headroom 0.1 --precision bf16 --optimizer sgd --compile --mode both "
            "--seq-len 64 --task causal-lm --start 2 --max-batch-size 99 --multiple-of pow2 --steps 5 --time-limit 30 "
            "--grad-checkpointing --avoid-oom"
        )
        shown = run(*line.split())
        assert shown.exit_code == 0, shown.output
        (call,) = asked
        options = call["workload"].options
        assert isinstance(call["workload"], HFTarget)
        assert (options.precision, options.optimizer, options.mode, options.seq_len) == ("bf16", "sgd", "both", 64)
        assert options.compile
        assert options.grad_checkpointing
        expected = {
            "memory_limit": 10 * GIB, "headroom": 0.1, "start": 2, "max_batch_size": 99, "multiple_of": "pow2",
            "steps": 5, "time_limit_s": 30, "avoid_oom": True,
        }  # fmt: skip
        assert {name: call[name] for name in expected} == expected

    def test_sizes_that_exclude_one_another_are_refused_before_the_device_is_shown(self, asked):
        shown = run("hf:gpt2", "--multiple-of", "8", "--max-batch-size", "4")
        assert (shown.exit_code, shown.stdout, asked) == (2, "", [])
        assert shown.stderr == "Error: --max-batch-size 4: must be at least multiple_of, 8\n"

    def test_gpu_is_another_word_for_device(self, asked, monkeypatch):
        seen: list[Any] = []

        def resolved(name: str, **rest: Any) -> FakeDevice:
            seen.append((name, rest["any_capability"], rest["count"]))
            return FakeDevice(16 * GIB, lambda n: n * GIB)

        monkeypatch.setattr(resolve, "resolve_device", resolved)
        run("hf:gpt2", "--gpu", "v100", "--any-capability")
        run("hf:gpt2", "--device", "cuda:1")
        run("--gpu", "l4", "--count", "2", "--", "echo", "{batch_size}")
        assert seen == [("v100", True, 1), ("cuda:1", False, 1), ("l4", False, 2)]

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--memory-limit", "10 apples"),
            ("--memory-limit", "0"),
            ("--headroom", "1"),
            ("--headroom", "-0.1"),
            ("--multiple-of", "0"),
            ("--multiple-of", "three"),
            ("--max-batch-size", "0"),
            ("--steps", "1"),
            ("--precision", "fp8"),
            ("--optimizer", "lion"),
            ("--mode", "test"),
            ("--time-limit", "0"),
            ("--headroom", "nan"),
            ("--time-limit", "nan"),
            ("--time-limit", "inf"),
            ("--task", "chess"),
        ],
    )
    def test_a_bad_value_is_one_line_that_names_the_option(self, asked, option, value):
        shown = run("hf:gpt2", option, value)
        assert shown.exit_code == 2
        assert not asked
        assert option in shown.stderr
        assert len(shown.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("hf:gpt2 --gpu l4 --device cpu", "one name, not 2; a command with several ranks has --count"),
            ("hf:gpt2 --gpu l4 --count 2", "--count 2: must be left out: a TARGET trains on one GPU"),
        ],
    )
    def test_several_gpus_are_for_a_command(self, asked, line, said):
        shown = run(*line.split())
        assert (shown.exit_code, asked) == (2, [])
        assert said in shown.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hf:gpt2 --per-rank", "used among several ranks: torchrun ... -m autobatch probe TARGET"),
        ("hf:gpt2 --per-rank --effective-batch-size 8", "left out with --effective-batch-size, whose plan"),
        ("hf:gpt2 --per-rank --sweep seq_len=8,9", "left out with --sweep, whose table"),
        ("--per-rank -- python train.py {batch_size}", "left out with a COMMAND, whose ranks are given one number"),
    ],
)
def test_a_size_for_each_rank_is_for_a_target_among_several(asked, line, said):
    shown = run(*line.split())
    assert (shown.exit_code, asked) == (2, [])
    assert f"must be {said}" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_batch_norm_that_fails_at_one_sample_hears_of_start(monkeypatch):
    def find(workload: Any, **options: Any) -> BatchSizeResult:
        torch.nn.BatchNorm1d(4)(torch.ones(1, 4))
        raise AssertionError("torch refuses one value per channel")

    monkeypatch.setattr(finder, "find", find)
    shown = run("hf:gpt2", "--device", "cpu")
    assert shown.exit_code == 4
    assert shown.stderr.splitlines()[-1].endswith("; `--start 2` begins with two samples")


class TestOutput:
    def test_plain_lines_begin_with_the_device_and_end_with_the_answer(self, asked):
        lines = run("hf:gpt2").stdout.splitlines()
        assert lines[0] == "Device: fake device (cpu), 16.00 GiB, 16.00 GiB free"
        assert lines[1] == "Target: hf:gpt2"
        assert lines[2:6] == [
            "trial=1 batch_size=4 outcome=fits mode=train peak_gib=4.000 budget_gib=10.000 step_s=0.2500 took_s=1.50",
            "trial=2 batch_size=16 outcome=oom mode=train peak_gib=16.000 budget_gib=10.000 step_s=0.2500 took_s=1.50",
            "trial=3 batch_size=8 outcome=fits mode=train peak_gib=8.000 budget_gib=10.000 step_s=0.2500 took_s=1.50",
            "trial=4 batch_size=8 outcome=fits mode=train peak_gib=8.000 budget_gib=10.000 step_s=0.2500 took_s=1.50 "
            "(confirmed after smaller batches)",
        ]
        assert lines[6] == "Note: more would fit with expandable segments"
        assert (
            lines[7] == "Largest batch on fake device: 8 (16 does not fit). 3 trials and 1 to confirm, 1 failure, 6.0 s"
        )
        assert "batch_size=8" in lines[8]
        assert len(lines) == 9

    def test_a_name_that_the_terminal_cannot_show_is_no_reason_to_fail(self, asked):
        shown = CliRunner(charset="ascii").invoke(main, ["probe", "hf:größe"])
        assert shown.exit_code == 0, shown.output
        assert "Target: hf:gr\\xf6\\xdfe" in shown.stdout

    def test_json_is_written_and_reads_back(self, asked, tmp_path: Path):
        path = tmp_path / "result.json"
        assert run("hf:gpt2", "--json", str(path)).exit_code == 0
        result = BatchSizeResult.from_json(path.read_text())
        assert result.batch_size == 8
        assert json.loads(path.read_text())["trials"][1]["outcome"] == "oom"

    @pytest.mark.parametrize("place", ["missing/result.json", "."])
    def test_an_unwritable_output_is_refused_before_anything_runs(self, asked, tmp_path: Path, place):
        shown = run("hf:gpt2", "--json", str(tmp_path / place))
        assert (shown.exit_code, asked) == (2, [])
        assert "cannot be written" in shown.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full, as Linux has one")
    def test_a_disk_that_fills_while_it_is_probed_is_one_line_after_the_answer(self, asked):
        shown = run("hf:gpt2", "--json", "/dev/full")
        assert shown.exit_code == 2
        assert "Largest batch on fake device: 8" in shown.stdout
        assert shown.stderr.startswith("Error: json='/dev/full': must be a file that can be written (No space left")

    def test_trying_the_output_leaves_an_old_file_as_it_was(self, asked, monkeypatch, tmp_path: Path):
        path = tmp_path / "old.json"
        path.write_text("old")

        def failing(*args: Any, **options: Any) -> None:
            raise RuntimeError("the workload's")

        monkeypatch.setattr(finder, "find", failing)
        assert run("hf:gpt2", "--json", str(path)).exit_code == 4
        assert path.read_text() == "old"
