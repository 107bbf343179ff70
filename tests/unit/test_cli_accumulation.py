"""``--effective-batch-size``: the plan of an answer, what is printed of it, and what is refused before a device is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from autobatch.cli import main
from autobatch.cli.accumulation import plan_of_equals
from autobatch.probe import finder
from autobatch.probe.command import Command
from autobatch.probe.search.rounding import Rounding
from autobatch.result import BatchSizeResult, Outcome, Trial
from autobatch.testing import FakeDevice
from autobatch.units import GIB
from autobatch.virtual import resolve

COMMAND = ["--", sys.executable, "train.py", "{batch_size}", "{accumulation_steps}"]


class TestPlan:
    @pytest.mark.parametrize(
        ("effective", "fits", "ranks", "equation"),
        [
            (96, 50, 1, "96 = 48 samples x 2 steps"),
            (512, 16, 1, "512 = 16 samples x 32 steps"),
            (96, 96, 1, "96 = 96 samples x 1 step"),
            (102, 30, 1, "102 = 17 samples x 6 steps"),
            (7, 4, 1, "8 = 4 samples x 2 steps"),
            (4096, 100, 8, "4096 = 64 samples x 8 steps x 8 ranks"),
            (10, 10, 4, "12 = 3 samples x 1 step x 4 ranks"),
        ],
    )
    def test_exact_where_large_micro_batches_can_be_and_else_the_nearest(self, effective, fits, ranks, equation):
        assert str(plan_of_equals(effective, fits, ranks)) == equation

    @given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 5))
    def test_no_other_large_micro_batch_is_nearer(self, effective, fits, ranks):
        effective = max(effective, ranks)
        plan = plan_of_equals(effective, fits, ranks)
        most = min(fits, -(-effective // ranks))
        assert plan.effective_batch_size == plan.micro_batch_size * plan.steps * ranks
        assert (plan.remainder, plan.world_size) == (0, ranks)
        assert most // 2 < plan.micro_batch_size <= most
        missed = min(
            abs(micro * steps * ranks - effective)
            for micro in range(most // 2 + 1, most + 1)
            for steps in range(1, effective + 2)
        )
        assert abs(plan.effective_batch_size - effective) == missed

    @given(st.integers(1, 2000), st.integers(1, 600), st.integers(1, 9), st.sampled_from(["auto", "pow2", 1, 3, 8]))
    def test_gradients_that_a_plan_accumulates_were_held_in_the_trials_of_the_answer(
        self, effective, fits, ranks, multiple_of
    ):
        rounding = Rounding(multiple_of)
        effective, fits = max(effective, ranks), rounding.down(fits) or rounding.size(1)
        plan = plan_of_equals(effective, fits, ranks, multiple_of=multiple_of)
        command = Command(COMMAND[1:], effective_batch_size=effective)
        assert plan.steps == 1 or command.accumulation_steps(fits, ranks) > 1
        assert multiple_of == "auto" or rounding.down(plan.micro_batch_size) == plan.micro_batch_size


class Acted:
    """A search that is acted: what it was called with, and what of its answer a test would have otherwise."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answer: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}

    def find(self, workload: Any, **options: Any) -> BatchSizeResult:
        self.calls.append({"workload": workload, **options})
        command = {"command": list(workload.words), "workload": workload.title} if type(workload) is Command else {}
        answer = {"batch_size": 50, "proof": "next_size_failed", "smallest_failure": 51, **self.answer}
        environment = {"device": "fake device", **command, **self.environment}
        return BatchSizeResult(
            trials=(Trial(batch_size=50, outcome=Outcome.FITS),), environment=environment, duration_s=6.0, **answer
        )


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Acted:
    acted = Acted()
    monkeypatch.setattr(finder, "find", acted.find)
    monkeypatch.setattr(resolve, "resolve_device", lambda name, **rest: FakeDevice(16 * GIB, lambda n: n * GIB))
    return acted


def run(*arguments: object):
    return CliRunner().invoke(main, ["probe", *map(str, arguments)])


class TestAnswer:
    def test_of_a_target_the_plan_and_both_numbers_follow_the_answer(self, acted):
        lines = run("hf:gpt2", "--effective-batch-size", 96).stdout.splitlines()
        assert lines[-3:] == [
            "Largest batch on fake device: 50 (51 does not fit). 1 trial, 0 failures, 6.0 s",
            "  Plan:    96 = 48 samples x 2 steps; 50 fit while gradients accumulate",
            "  Use it:  DataLoader(dataset, batch_size=48), 2 accumulation steps  or  "
            "TrainingArguments(per_device_train_batch_size=48, gradient_accumulation_steps=2)",
        ]

    def test_of_a_command_both_numbers_stand_in_it(self, acted):
        acted.environment["ranks"] = 2
        lines = run("--effective-batch-size", 400, *COMMAND).stdout.splitlines()
        assert lines[-2:] == [
            "  Plan:    400 = 50 samples x 4 steps x 2 ranks",
            f"  Use it:  {sys.executable} train.py 50 4",
        ]

    @pytest.mark.parametrize(
        ("effective", "ranks", "said"),
        [
            (53, 1, "do not make 53: 54 = 27 samples x 2 steps is nearest; exact: 53 = 1 sample x 53 steps."),
            (53, 4, "do not make 53: 52 = 13 samples x 1 step x 4 ranks is nearest."),
        ],
    )
    def test_where_a_command_cannot_meet_it_the_note_says_what_it_takes(self, acted, effective, ranks, said):
        acted.environment["ranks"] = ranks
        notes = [
            line for line in run("--effective-batch-size", effective, *COMMAND).stdout.splitlines() if "Note" in line
        ]
        assert notes == [f"Note: Large micro-batches of one size {said}"]

    def test_a_loop_of_ones_own_can_meet_it_all_the_same(self, acted):
        shown = run("hf:gpt2", "--effective-batch-size", 53).stdout
        assert "exact: 53 = 1 sample x 53 steps or autobatch.Accumulator(..., micro_batch_size=50)." in shown

    def test_a_batch_that_fits_whole_is_one_step_and_no_larger_one_was_wanted(self, acted):
        acted.answer.update(batch_size=40, proof="max_batch_size", smallest_failure=None)
        lines = run("hf:gpt2", "--effective-batch-size", 40).stdout.splitlines()
        assert "40 (an effective batch of 40 takes no more)" in lines[-3]
        assert lines[-2] == "  Plan:    40 = 40 samples x 1 step"

    def test_a_cap_of_the_callers_own_keeps_its_words(self, acted):
        acted.answer.update(batch_size=20, proof="max_batch_size", smallest_failure=None)
        shown = run("hf:gpt2", "--effective-batch-size", 40, "--max-batch-size", 20).stdout
        assert "20 (the largest size allowed)" in shown
        assert acted.calls[0]["max_batch_size"] == 20

    def test_json_has_the_plan_and_the_notes_and_reads_back(self, acted, tmp_path: Path):
        path = tmp_path / "result.json"
        assert run("--effective-batch-size", 53, "--json", path, *COMMAND).exit_code == 0
        result = BatchSizeResult.from_json(path.read_text())
        assert result.environment["accumulation"] == {
            "effective_batch_size": 54, "micro_batch_size": 27, "steps": 2, "remainder": 0, "world_size": 1,
        }  # fmt: skip
        assert result.environment["effective_batch_size"] == 53
        assert any("do not make 53" in note for note in result.notes)
        assert json.loads(path.read_text())["format_version"] == 1

    def test_without_the_option_nothing_is_said_of_it(self, acted, tmp_path: Path):
        path = tmp_path / "result.json"
        assert "accumul" not in run("hf:gpt2", "--json", path).stdout
        assert "accumul" not in path.read_text()


class TestSearch:
    @pytest.mark.parametrize(
        ("line", "cap"),
        [
            ("--effective-batch-size 512", 512),
            ("--effective-batch-size 512 --max-batch-size 100", 100),
            ("--effective-batch-size 512 --max-batch-size 9999", 512),
            ("--effective-batch-size 512 --mode both", None),  # of evaluation more is of use
            ("", None),
        ],
    )
    def test_nothing_larger_than_the_whole_is_tried(self, acted, line, cap):
        assert run("hf:gpt2", *line.split()).exit_code == 0
        assert acted.calls[0]["max_batch_size"] == cap

    @pytest.mark.parametrize(
        ("fits", "line", "is_said"), [(1488, "", True), (1472, "", False), (1488, "--max-batch-size 1488", False)]
    )
    def test_a_whole_that_is_no_round_size_is_said_not_to_have_been_tried(self, acted, fits, line, is_said):
        acted.answer.update(batch_size=fits, proof="max_batch_size", smallest_failure=None)
        shown = run("hf:gpt2", "--effective-batch-size", 1500, *line.split()).stdout
        assert ("1500 is not a round size, so it was not tried as one batch" in shown) == is_said
        assert "1500 = 750 samples x 2 steps" in shown

    def test_a_workload_with_an_evaluation_of_its_own_hears_what_was_not_tried(self, acted):
        acted.answer.update(eval_batch_size=96)
        assert "For evaluation nothing above 96 was tried" in run("hf:gpt2", "--effective-batch-size", 96).stdout
        assert "For evaluation" not in run("hf:gpt2", "--effective-batch-size", 96, "--mode", "both").stdout

    def test_the_target_and_the_command_are_told(self, acted):
        run("hf:gpt2", "--effective-batch-size", 96)
        run("--effective-batch-size", 96, *COMMAND)
        assert acted.calls[0]["workload"].options.effective_batch_size == 96
        assert acted.calls[1]["workload"] == Command(COMMAND[1:], effective_batch_size=96)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["hf:gpt2", "--effective-batch-size", "0"], "'--effective-batch-size': 0 is not in the range"),
        (["hf:gpt2", "--effective-batch-size", "2.5"], "'--effective-batch-size': '2.5' is not a valid integer"),
        (["--effective-batch-size", "8", *COMMAND[:-1]], "the command must say {accumulation_steps} where"),
        (COMMAND, "must be the samples of an optimizer step, for the command says {accumulation_steps}"),
        (["hf:gpt2", "--effective-batch-size", "8", "--mode", "eval"], "must be left out with --mode eval"),
        (["hf:gpt2", "--effective-batch-size", "8", "--sweep", "seq_len=8,9"], "must be left out with --sweep"),
        (["hf:gpt2", "--effective-batch-size", "7", "--multiple-of", "8"], "7: must be at least multiple_of, 8"),
        (["--effective-batch-size", "7", "--multiple-of", "8", *COMMAND], "7: must be at least multiple_of, 8"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2_before_a_device_is_named(acted, line, said):
    done = run(*line)
    assert (done.exit_code, done.stdout, acted.calls) == (2, "", [])
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
