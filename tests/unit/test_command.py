"""A training command: what is refused before it runs, and what its end means."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from autobatch import Command, InvalidArgumentError, WorkloadFailedError, find
from autobatch.cli import main
from autobatch.device.host import HostDevice
from autobatch.errors import DeviceCorruptedError
from autobatch.probe.command import TRACKERS, tracker_variables
from autobatch.probe.command import executor as command_executor
from autobatch.probe.command.executor import CommandExecutor
from autobatch.probe.command.run import Ending
from autobatch.probe.command.verdict import SHRANK, attempt_of
from autobatch.probe.trial import TrialRequest
from autobatch.result import Outcome
from autobatch.testing import FakeDevice
from autobatch.units import GIB

PYTHON = sys.executable
BATCH, STEPS = "{batch_size}", "{accumulation_steps}"


class TestWords:
    def test_the_number_and_the_folder_are_put_in_wherever_they_stand_and_nothing_else_is_touched(self):
        command = Command([PYTHON, "{x}", f"--batch-size={BATCH}", "{scratch}/a", f"{BATCH}x{BATCH}", "{}"])
        assert command.filled(7, "/tmp/s") == [PYTHON, "{x}", "--batch-size=7", "/tmp/s/a", "7x7", "{}"]

    def test_the_steps_are_put_in_too_and_what_was_put_in_is_left_alone(self):
        command = Command([PYTHON, f"--n={BATCH}", STEPS, f"{STEPS}x{BATCH}", "{scratch}"], effective_batch_size=8)
        assert command.filled(4, f"/{BATCH}", 2) == [PYTHON, "--n=4", "2", "2x4", f"/{BATCH}"]
        assert command.title == f"{PYTHON} --n={BATCH} {STEPS} {STEPS}x{BATCH} {{scratch}}"

    @pytest.mark.parametrize(
        ("words", "effective", "said"),
        [
            ([PYTHON, BATCH, STEPS], None, "None: must be the samples of an optimizer step"),
            ([PYTHON, BATCH], 8, r"8: must be left out, or the command must say \{accumulation_steps\}"),
            ([PYTHON, BATCH, STEPS], 0, "a positive whole number"),
            ([PYTHON, BATCH, STEPS], True, "a positive whole number"),
            ([PYTHON, BATCH, STEPS], "8", "a positive whole number"),
        ],
    )
    def test_steps_and_an_effective_batch_come_together(self, words, effective, said):
        with pytest.raises(InvalidArgumentError, match=f"^effective_batch_size=.*{said}"):
            Command(words, effective_batch_size=effective)

    @given(st.lists(st.text(st.characters(exclude_characters="\0")), max_size=4), st.integers(1, 10**9))
    def test_words_without_placeholders_stay_as_they_are(self, words, size):
        words = [word.replace("{", "") for word in words]
        filled = Command([PYTHON, "train.py", *words, BATCH]).filled(size, "s")
        assert filled == [PYTHON, "train.py", *words, str(size)]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "a list of words"),
            (f"python train.py {BATCH}", "a list of words"),
            ([PYTHON, 3, BATCH], "a list of words"),
            ([PYTHON, "train.py", "--batch-size", "32"], r"says \{batch_size\}"),
            (["no-such-program", BATCH], "no-such-program is not found"),
            ([PYTHON, "-I", "train.py", BATCH], "without -I"),
            ([PYTHON, "-uE", "train.py", BATCH], "without -uE"),
            ([PYTHON, "-X", "dev", "-S", "-m", "pkg", BATCH], "without -S"),
            (["env", "-i", PYTHON, "train.py", BATCH], "without env -i"),
            (["env", "A=1", PYTHON, "-I", "train.py", BATCH], "without -I"),
        ],
    )
    def test_what_cannot_be_probed_is_refused_by_name(self, words, said):
        with pytest.raises(InvalidArgumentError, match=said):
            Command(words)

    @pytest.mark.parametrize(
        "words",
        [
            [PYTHON, "-u", "train.py", "-I", BATCH],
            [PYTHON, "-W", "ISE", "train.py", BATCH],
            [PYTHON, "-m", "pkg.ISE", BATCH],
            [PYTHON, "-c", "import sys", "-E", BATCH],
            [PYTHON, "--check-hash-based-pycs", "default", "-c", "1", BATCH],
        ],
    )
    def test_flags_of_the_script_are_not_those_of_python(self, words):
        assert Command(words).words == tuple(words)

    @pytest.mark.parametrize("value", [0, -1, True, "10"])
    def test_a_bad_deadline_is_refused(self, value):
        with pytest.raises(InvalidArgumentError, match="step_within_s"):
            Command([PYTHON, BATCH], step_within_s=value)

    def test_the_missing_folder_and_the_silent_trackers_are_said(self):
        assert any("{scratch}" in line for line in Command([PYTHON, "train.py", BATCH]).warnings())
        (only,) = Command([PYTHON, "train.py", BATCH, "--out", "{scratch}"]).warnings()
        assert all(name in only for name in TRACKERS)
        variables = tracker_variables(Path("/s"))
        assert variables["WANDB_MODE"] == "disabled"
        assert variables["MLFLOW_TRACKING_URI"] == "file:///s/mlruns"

    def test_the_title_is_the_command_as_a_shell_has_it(self):
        assert Command([PYTHON, "a b.py", f"--n={BATCH}", BATCH]).title == f"{PYTHON} 'a b.py' --n={BATCH} {BATCH}"


class TestArgumentsOfFind:
    def test_what_means_nothing_to_a_command_is_refused(self):
        command = Command([PYTHON, BATCH])
        with pytest.raises(InvalidArgumentError, match="state"):
            find(command, state=[1], device="cpu")
        with pytest.raises(InvalidArgumentError, match="isolate"):
            find(command, isolate=False, device="cpu")

    def test_a_log_that_cannot_be_written_is_named(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match="log="):
            find(Command([PYTHON, BATCH], log=tmp_path / "no" / "log"), device="cpu")

    def test_a_device_that_a_command_cannot_be_measured_on_is_named(self):
        class Other(FakeDevice):
            torch_device = "mps"

        with pytest.raises(InvalidArgumentError, match="mps"):
            find(Command([PYTHON, BATCH]), device=Other(GIB, lambda n: n))

    def test_no_permitted_size_within_the_effective_batch_is_named(self):
        with pytest.raises(InvalidArgumentError, match=r"^effective_batch_size=7: must be at least multiple_of, 8"):
            find(Command([PYTHON, BATCH, STEPS], effective_batch_size=7), multiple_of=8, device="cpu")


class TestAccumulation:
    """Of a command that is acted."""

    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What was run: micro-batch, micro-batches of a step, optimizer steps, and the time for one of these."""
        runs: list[dict[str, Any]] = []

        def run(words: list[str], variables: Any, trace: Any, *, step_within_s: float) -> Ending:
            told = json.loads((trace.folder / "request.json").read_text())
            runs.append({"size": int(words[1]), "accumulation": int(words[2]), "steps": told["steps"]})
            runs[-1].update(told=told["batch_size"], within_s=step_within_s)
            reports = tuple(report(device="cpu", ranks=self.ranks) for _ in range(self.ranks))
            return Ending(code=0, silent=False, reports=reports)

        monkeypatch.setattr(command_executor, "run", run)
        return runs

    ranks = 1

    def executor(self, log: Path, effective: int | None = None) -> CommandExecutor:
        words = [PYTHON, BATCH, *([] if effective is None else [STEPS])]
        return CommandExecutor(Command(words, effective_batch_size=effective, log=log), HostDevice())

    @pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (48, 2), (95, 2), (96, 1)])
    def test_a_trial_holds_the_gradients_of_one_micro_batch_in_the_next(self, ran, tmp_path, size, accumulation):
        trial = self.executor(tmp_path / "log", 96).run(TrialRequest(batch_size=size, steps=3)).trial
        assert [(run["size"], run["accumulation"], run["steps"]) for run in ran] == [(size, accumulation, 3)]
        assert (trial.batch_size, ran[0]["told"]) == (size, size)  # the micro-batch, which data loaders have too

    @pytest.mark.parametrize(("size", "accumulation", "steps"), [(96, 1, 20), (48, 2, 20), (12, 8, 5), (1, 96, 3)])
    def test_the_confirmation_takes_as_many_micro_batches_as_there_will_be(
        self, ran, tmp_path, size, accumulation, steps
    ):
        self.executor(tmp_path / "log", 96).confirm((TrialRequest(batch_size=size, steps=20, history="a fresh start"),))
        assert [(run["accumulation"], run["steps"]) for run in ran] == [(accumulation, steps)]
        assert ran[0]["within_s"] == 600 * max(1, accumulation / 2)

    def test_once_the_ranks_are_known_they_count_and_what_was_run_without_is_run_anew(self, ran, tmp_path):
        self.ranks = 2
        executor = self.executor(tmp_path / "log", 96)
        for size in (48, 47):
            assert executor.run(TrialRequest(batch_size=size, steps=3)).trial.fits
        assert [(run["size"], run["accumulation"]) for run in ran] == [(48, 2), (48, 1), (47, 2)]

    def test_fewer_samples_than_ranks_are_refused(self, ran, tmp_path):
        self.ranks = 4
        with pytest.raises(
            InvalidArgumentError, match=r"^effective_batch_size=3: must be at least 4, a sample for each"
        ):
            self.executor(tmp_path / "log", 3).run(TrialRequest(batch_size=1, steps=3))

    def test_the_result_has_the_ranks_and_the_effective_batch_and_ends_there(self, ran, tmp_path, monkeypatch):
        self.ranks = 2
        command = Command([PYTHON, BATCH, STEPS], effective_batch_size=96, log=tmp_path / "log")
        result = find(command, device="cpu")
        assert (result.batch_size, result.proof) == (96, "max_batch_size")
        assert (result.environment["effective_batch_size"], result.environment["ranks"]) == (96, 2)
        assert result.conclusion.endswith("96 (an effective batch of 96 takes no more)")


class TestShell:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (["--gpu", "t4"], "give a TARGET, or a command after --"),
            (["hf:gpt2", "--gpu", "t4", "--", PYTHON, BATCH], "not both"),
            (["hf:gpt2", "--gpu", "t4", "--verbose"], "--verbose: must be left out"),
            (
                ["hf:gpt2", "--gpu", "t4", "--step-within", "9"],
                "--step-within 9.0: must be left out",
            ),
            (["--step-within", "nan", "--", PYTHON, BATCH], "--step-within"),
            (["--gpu", "t4", "--precision", "bf16", "--", PYTHON, BATCH], "--precision bf16: must be left out"),
            (["--gpu", "t4", "--seq-len", "8", "--", PYTHON, BATCH], "--seq-len 8: must be left out"),
            (["--gpu", "t4", "--compile", "--", PYTHON, BATCH], "--compile: must be left out"),
            (["--gpu", "t4", "--"], "a list of words"),
            (["--gpu", "t4", "--", PYTHON, "train.py"], BATCH),
        ],
    )
    def test_bad_usage_is_one_line_and_exit_code_2(self, line, said):
        done = CliRunner().invoke(main, ["probe", *line])
        assert done.exit_code == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def report(**told: Any) -> dict[str, Any]:
    plain = {"pid": 1, "command": [], "steps": 3, "done": True, "ranks": 1, "device": "cuda:0", "samples": None}
    figures = {"step_times_s": [9.0, 1.0, 1.0], "retries": [0, 0, 0], "peak_allocated_bytes": 10}
    return {**plain, **figures, **told}


def verdict(*reports: dict[str, Any], code: int | None = 0, silent: bool = False, **told: Any) -> Any:
    ending = Ending(code=code, silent=silent, reports=reports, tail="its last line", log="/log")
    request = TrialRequest(batch_size=8, steps=3, limit_bytes=100)
    options = {"kind": "cuda", "killed": False, "smaller_fitted": False, **told}
    return attempt_of(request, ending, **options)


def failure(tier: str | None, message: str = "why") -> dict[str, Any]:
    return report(done=False, failure={"type": "RuntimeError", "message": message, "tier": tier})


class TestVerdict:
    def test_a_measured_run_fits_with_its_figures(self):
        trial = verdict(report()).trial
        assert trial.fits
        assert (trial.steps, trial.measurement.step_time_s, trial.measurement.capacity_bytes) == (3, 1.0, 100)

    def test_of_several_ranks_the_worst_decides_and_the_largest_peak_is_told(self):
        ranks = [report(ranks=2), report(ranks=2, retries=[0, 1, 2], peak_allocated_bytes=20)]
        assert verdict(*ranks).trial.outcome is Outcome.THRASHED
        assert verdict(*ranks).trial.measurement.peak_allocated_bytes == 20
        assert verdict(report(ranks=2), failure("definite"), code=1).trial.outcome is Outcome.OOM

    @pytest.mark.parametrize(("tier", "outcome"), [("definite", Outcome.OOM), ("limit", Outcome.LIMIT)])
    def test_the_exception_says_whether_it_was_memory(self, tier, outcome):
        trial = verdict(failure(tier), code=1).trial
        assert (trial.outcome, trial.message) == (outcome, "why")

    def test_a_suspect_error_is_handed_on_with_the_output(self):
        attempt = verdict(failure("suspect"), code=1)
        assert attempt.trial.outcome is Outcome.OOM
        assert attempt.suspect.traceback_text == "its last line"

    def test_a_broken_device_is_no_answer(self):
        with pytest.raises(DeviceCorruptedError, match="why"):
            verdict(failure("fatal"), failure("definite"), code=1)

    def test_memory_wins_over_the_errors_that_it_causes_elsewhere(self):
        assert verdict(failure(None, "connection closed"), failure("definite"), code=1).trial.outcome is Outcome.OOM

    def test_an_error_that_was_caught_is_no_fit(self):
        trial = verdict(report(caught="CUDA out of memory")).trial
        assert trial.outcome is Outcome.OOM
        assert SHRANK in trial.message

    def test_an_error_that_was_caught_at_the_end_is_no_fit_and_no_other_failure(self):
        """Whatever the exit code, and also after a step; where another error follows, it may be that one."""
        for steps, code in ((0, 0), (1, 0), (1, 3), (0, None)):
            done = verdict(report(steps=steps, done=False, refused="CUDA out of memory", refusals=1), code=code)
            assert (done.trial.outcome, done.suspect) == (Outcome.OOM, None)
        done = verdict({**failure(None), "refused": "CUDA out of memory", "refusals": 1}, code=1)
        assert done.trial.outcome is Outcome.OOM
        assert "CUDA out of memory, and then RuntimeError: why" in str(done.suspect)

    def test_a_command_that_trains_to_its_end_in_fewer_steps_has_fitted(self):
        assert verdict(report(steps=2, done=False), code=0).trial.fits

    def test_a_data_set_that_is_too_small_is_a_limit_and_no_fit(self):
        assert verdict(report(samples=7)).trial.outcome is Outcome.LIMIT
        assert verdict(report(samples=8)).trial.fits
        assert verdict(report(steps=0, device="cpu"), smaller_fitted=True).trial.outcome is Outcome.LIMIT

    def test_death_by_the_kernel_for_lack_of_memory_is_out_of_memory(self):
        assert verdict(report(done=False), code=-9, killed=True).trial.outcome is Outcome.OOM
        assert verdict(report(done=False), code=1, killed=True).trial.outcome is Outcome.OOM
        assert verdict(report(done=False), code=-11, kind="cpu").suspect is not None

    @pytest.mark.parametrize(
        ("reports", "options", "said"),
        [
            ([], {}, "-I, -E or -S, an `env -i`"),
            ([report(steps=0)], {}, "exit code 0 before any optimizer step"),
            ([report(steps=0)], {"code": 2}, "exit code 2 before any optimizer step"),
            ([{**failure(None), "steps": 0}], {"code": 1}, "RuntimeError: why"),
            ([report(steps=0)], {"code": None, "silent": True}, "no optimizer step within"),
            ([report(done=False)], {"code": None, "silent": True}, "no further optimizer step within"),
            ([report(done=False)], {"code": 1}, "exit code 1 after 3 of 3 optimizer steps"),
            ([report(ranks=2)], {"code": 1}, "exit code 1 after 3 of 3 optimizer steps"),
            ([report(done=False)], {"code": -9}, "exit code -9 after 3 of 3 optimizer steps"),
            ([report(done=False)], {"code": None}, "a process of it was lost after 3 of 3 optimizer steps"),
            ([report(device="cpu")], {}, "trained on the CPU"),
        ],
    )
    def test_what_is_not_memory_is_told_with_the_output_and_the_log(self, reports, options, said):
        with pytest.raises(WorkloadFailedError, match=said) as caught:
            verdict(*reports, **options)
        assert caught.value.traceback_text == "its last line"
        assert "/log" in str(caught.value)
