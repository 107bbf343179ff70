"""Training commands for real, unedited: on host memory, on GPUs that are not there, under the usual launchers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner

from autobatch import (
    BatchSizeResult,
    Command,
    InvalidArgumentError,
    Outcome,
    VirtualGPU,
    Workload,
    WorkloadFailedError,
    find,
)
from autobatch.cli import main
from autobatch.device.host import HostDevice
from autobatch.probe.command import run as command_run
from autobatch.probe.command.executor import CommandExecutor
from autobatch.probe.command.verdict import SHRANK
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.replay.forecast import forecast, peak_reserved_bytes
from autobatch.replay.scaling import scaling
from autobatch.units import GIB, MIB

SCRIPTS = Path(__file__).parents[1] / "commands"
sys.path.append(str(SCRIPTS))  # as scripts they import one another

import plain  # noqa: E402
import with_transformers  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host memory and virtual GPUs are Linux's")

BIN = Path(sys.executable).parent
CARD = "memory=2GiB,capability=8.0"
CODE = [sys.executable, "-c"]
ODD = [sys.executable, str(SCRIPTS / "odd.py")]
SIZES = ["--batch-size", "{batch_size}", "--out", "{scratch}"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def attempt(words: list[str], log: Path, size: int = 2, *, device: Any = None, **options: Any) -> Attempt:
    """One trial of two steps; nothing is left of it."""
    place = device or HostDevice(memory_limit_bytes=256 * MIB)
    before = set(psutil.Process().children(recursive=True))
    with closing(CommandExecutor(Command(words, log=log, **options), place)) as executor:
        done = executor.run(TrialRequest(batch_size=size, steps=2, limit_bytes=256 * MIB))
    assert not set(psutil.Process().children(recursive=True)) - before
    return done


def recorded(words: list[str], log: Path, *sizes: int, device: Any = None) -> list[Attempt]:
    """Trials that record what the command allocates, on a virtual GPU unless it is said where."""
    place = device or VirtualGPU(CARD)
    limit_bytes = None if device is None else GIB
    with closing(CommandExecutor(Command(words, log=log), place)) as executor:
        requests = [TrialRequest(batch_size=n, steps=3, limit_bytes=limit_bytes, records=True) for n in sizes]
        return [executor.run(request) for request in requests]


def test_what_a_command_allocates_is_recorded_from_its_first_forward_pass(log):
    """The batch is on the GPU then, and grows with the size as all the rest; so two runs foretell a third."""
    words = [sys.executable, str(SCRIPTS / "plain.py"), *SIZES]
    small, larger, large = recorded(words, log, 200, 300, 4000)
    assert small.trace is not None
    assert larger.trace is not None
    assert len(small.trace.steps) == 3
    needed_bytes = large.trial.measurement.peak_reserved_bytes
    found = forecast(scaling(small.trace, 200, larger.trace, 300), needed_bytes, smallest=200)
    assert found is not None
    assert 0.97 * 4000 <= found.most <= 1.1 * 4000


def test_on_host_memory_too(log):
    """Up to what the process has beside tensors, which a third run tells. Batches of workers are no private data."""
    words = [sys.executable, str(SCRIPTS / "plain.py"), *SIZES, "--workers", "2"]
    small, larger, large = recorded(words, log, 200, 300, 4000, device=HostDevice(memory_limit_bytes=GIB))
    assert small.trace is not None
    assert larger.trace is not None
    assert len(small.trace.steps) == 3
    seen = scaling(small.trace, 200, larger.trace, 300)
    needed_bytes = large.trial.measurement.peak_reserved_bytes
    beside_bytes = needed_bytes - peak_reserved_bytes(seen.trace, seen.sizes(4000))
    assert 0 < beside_bytes < 0.6 * needed_bytes  # the parameters, and what the first backward pass loads
    found = forecast(seen, needed_bytes - beside_bytes, smallest=200)
    assert found is not None
    assert 4000 <= found.most <= 1.01 * 4000
    assert needed_bytes <= large.trial.measurement.capacity_bytes


def test_a_step_that_is_compiled_whole_is_left_alone(log):
    """What the compiler sees must not hold hooks of ours."""
    code = (
        "import sys, torch; n = int(sys.argv[1]); model = torch.nn.Linear(64, 1).cuda()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "@torch.compile(backend='eager', fullgraph=True)\n"
        "def loss_of(x): return model(x).square().mean()\n"
        "for _ in range(20):\n"
        "    loss_of(torch.randn(n, 64, device='cuda')).backward(); optimizer.step(); optimizer.zero_grad()"
    )
    (done,) = recorded([*CODE, code, "{batch_size}"], log, 64)
    assert done.trial.fits


def test_a_history_that_the_command_keeps_itself_is_left_to_it(log):
    code = (
        "import sys, torch; torch.zeros(1, device='cuda')\n"
        "torch.cuda.memory._record_memory_history(context=None, max_entries=10_000)\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv[1:] = ['--batch-size', '{{batch_size}}']\n"
        "import plain; plain.train(plain.parse())"
    )
    (done,) = recorded([*CODE, code], log, 64)
    assert done.trial.fits
    assert done.trace is None


def test_a_command_that_ends_early_while_it_is_recorded_ends_as_ever(log):
    """With torch's profiler at work a process would crash at its end, and a crash would be taken for one of memory."""
    code = (
        "import sys, torch; model = torch.nn.Linear(1, 1); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model(torch.ones(int(sys.argv[1]), 1)).sum().backward(); optimizer.step()"
    )
    (done,) = recorded([*CODE, code, "{batch_size}"], log, 2, device=HostDevice(memory_limit_bytes=GIB))
    assert (done.trial.fits, done.trial.steps) == (True, 1)


class TestEndings:
    def test_a_run_is_measured_and_leaves_after_its_steps(self, log):
        trial = attempt([*ODD, "train_with_adam", "{batch_size}"], log, 4).trial
        assert (trial.outcome, trial.steps) == (Outcome.FITS, 2)
        assert trial.measurement.peak_allocated_bytes > 2 * MIB
        assert f"=== batch 4: {sys.executable} {ODD[1]} train_with_adam 4" in log.read_text()

    @pytest.mark.parametrize("how", ["train", pytest.param("give_up", marks=pytest.mark.slow)])
    def test_out_of_memory_is_known_by_the_exception_caught_or_not(self, log, how):
        trial = attempt([*ODD, how, "{batch_size}"], log, 400).trial
        assert trial.outcome is Outcome.OOM
        assert "DefaultCPUAllocator: can't allocate memory" in trial.message

    @pytest.mark.parametrize("how", ["leave", "fail_otherwise"])
    def test_also_where_nothing_of_it_leaves_the_process(self, log, how):
        """Its exit code is 0, or its error another one."""
        device = HostDevice(memory_limit_bytes=256 * MIB)
        with closing(CommandExecutor(Command([*ODD, how, "{batch_size}"], log=log), device)) as executor:
            request = TrialRequest(batch_size=400, steps=3, limit_bytes=256 * MIB, records=True)
            done = executor.run(request)
        assert done.trial.outcome is Outcome.OOM
        assert "DefaultCPUAllocator: can't allocate memory" in done.trial.message
        assert (done.suspect is None) == (how == "leave")

    @pytest.mark.parametrize("how", ["leave", pytest.param("skip", marks=pytest.mark.slow)])
    def test_on_a_gpu_too_where_it_may_go_on_for_ever(self, log, how):
        (done,) = recorded([*ODD, how, "{batch_size}"], log, 60_000)
        assert done.trial.outcome is Outcome.OOM
        assert "CUDA out of memory" in done.trial.message
        assert done.suspect is None

    @pytest.mark.parametrize(("mebibytes", "outcome"), [(220, Outcome.FITS), (300, Outcome.OVER_HEADROOM)])
    def test_what_finds_its_place_in_the_holes_of_a_heap_counts(self, log, mebibytes, outcome):
        assert attempt([*ODD, "in_holes", "{batch_size}"], log, mebibytes).trial.outcome is outcome

    @pytest.mark.slow
    def test_fewer_steps_than_asked_are_a_fit(self, log):
        with closing(CommandExecutor(Command([*ODD, "two_steps", "{batch_size}"], log=log), HostDevice())) as executor:
            assert executor.run(TrialRequest(batch_size=2, steps=3)).trial.steps == 2

    @pytest.mark.slow
    def test_two_optimizers_that_take_turns_are_one_step(self, log):
        assert attempt([*ODD, "gan", "{batch_size}"], log).trial.fits
        assert log.read_text().count("turn") == 2

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([*CODE, "pass"], "exit code 0 before any optimizer step"),
            ([*ODD, "key_error"], "KeyError: 'column 7'"),
            ([*CODE, "import os; os.kill(os.getpid(), 9)"], "exit code -9"),
        ],
        ids=["leaves", "fails", "killed"],
    )
    def test_what_is_not_memory_ends_the_search_with_its_last_lines(self, log, words, said):
        with pytest.raises(WorkloadFailedError, match=said) as caught:
            attempt([*words, "{batch_size}"], log, 3)
        assert str(log) in str(caught.value)
        if "key_error" in words:
            assert caught.value.traceback_text.endswith("KeyError: 'column 7'")

    def test_a_command_that_reaches_no_step_is_given_up(self, log):
        with pytest.raises(WorkloadFailedError, match="no optimizer step within"):
            attempt([*CODE, "import time; time.sleep(600)", "{batch_size}"], log, step_within_s=1)

    def test_a_script_whose_own_first_line_keeps_us_out_is_told_so(self, log, tmp_path):
        script = tmp_path / "train"
        script.write_text(f"#!{sys.executable} -I\n")
        script.chmod(0o755)
        with pytest.raises(WorkloadFailedError, match="a flag -I, -E or -S"):
            attempt([str(script), "{batch_size}"], log)

    @pytest.mark.slow
    def test_a_script_that_swallows_the_exit_is_ended_all_the_same(self, log, monkeypatch):
        monkeypatch.setattr(command_run, "LEAVE_WITHIN_S", 0.5)
        monkeypatch.setattr(command_run, "TERM_WITHIN_S", 0.5)
        assert attempt([*ODD, "swallow", "{batch_size}"], log).trial.fits
        assert "went on" in log.read_text()

    @pytest.mark.slow
    def test_each_trial_has_a_folder_of_its_own_that_goes_with_it(self, log):
        shell = 'echo "in: $(ls -A "$0")"; touch "$0/mine"; exec "$@"'
        words = ["sh", "-c", shell, "{scratch}", *ODD, "train", "{batch_size}"]
        for _ in range(2):
            assert attempt(words, log).trial.fits
        assert [line for line in log.read_text().splitlines() if line.startswith("in:")] == ["in: ", "in: "]

    @pytest.mark.slow
    def test_output_is_shown_as_it_comes_if_asked(self, log, capsys):
        attempt([*ODD, "gan", "{batch_size}"], log, verbose=True)
        assert "turn 0\n" in capsys.readouterr().err

    def test_killing_the_prober_ends_what_its_command_started(self, log, tmp_path):
        words = [*ODD, "leave_a_child", "{batch_size}"]
        code = (
            "from autobatch import Command, find\n"
            f"find(Command({words!r}, log={str(log)!r}), device='cpu', steps=100000)\n"
        )
        # A killed prober cannot remove its folder.
        prober = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
        deadline_s = time.monotonic() + 60
        while not (log.exists() and "child started" in log.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        left = psutil.Process(prober.pid).children(recursive=True)
        prober.send_signal(signal.SIGKILL)
        prober.wait()
        assert len(left) == 2  # the command, and the child in a session of its own
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive


def test_on_a_virtual_gpu_a_shrinking_batch_is_no_fit(log):
    """Catches the error, halves its own batch and goes on."""
    command = Command([*ODD, "shrink", "{batch_size}", "{scratch}"], log=log)
    result = find(command, device="memory=1GiB,capability=8.0", start=256, multiple_of="pow2", max_batch_size=512)
    assert (result.batch_size, result.smallest_failure) == (256, 512)
    assert any(SHRANK in note for note in result.notes)
    assert str(log) in result.environment["log"]


def test_on_host_memory_neither(log):
    """There the error is any RuntimeError, of which Python tells nobody who does not catch it."""
    command = Command([*ODD, "shrink", "{batch_size}", "{scratch}"], log=log)
    options = {"start": 32, "multiple_of": "pow2", "max_batch_size": 256}
    result = find(command, device="cpu", memory_limit="256MiB", **options)
    assert result.batch_size < 256
    assert result.smallest_failure == 2 * result.batch_size
    assert any(SHRANK in note for note in result.notes)


@pytest.mark.slow
def test_a_command_that_makes_other_batches_than_asked_ends_the_search(log):
    """Otherwise it would never end: every size fits."""
    place = HostDevice(memory_limit_bytes=256 * MIB)
    with closing(CommandExecutor(Command([*ODD, "ignore", "{batch_size}", "{scratch}"], log=log), place)) as executor:
        assert executor.run(TrialRequest(batch_size=2, steps=2, limit_bytes=256 * MIB)).trial.fits
        with pytest.raises(WorkloadFailedError, match="batch of 20000000 took no more memory than one of 2"):
            executor.run(TrialRequest(batch_size=20_000_000, steps=2, limit_bytes=256 * MIB))


def test_from_the_shell_with_its_exit_codes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options = ["probe", "--device", "cpu", "--memory-limit", "256MiB", "--start", "2", "--max-batch-size", "2"]
    path = tmp_path / "result.json"
    done = CliRunner().invoke(main, [*options, "--json", str(path), "--", *ODD, "train", "{batch_size}"])
    assert done.exit_code == 0, done.output
    assert f"  Use it:  {' '.join(ODD)} train 2" in done.stdout
    assert "say {scratch}" in done.stdout
    assert "holds for each process" in done.stdout
    result = BatchSizeResult.from_json(path.read_text())
    assert Path(result.environment["log"]).is_relative_to(tmp_path)
    assert [trial.history for trial in result.confirmation] == ["a fresh start"]


def test_exit_code_4_from_the_shell_with_the_command_s_own_last_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    code = "import sys; print('about', sys.argv[1]); raise KeyError('column 7')"
    done = CliRunner().invoke(main, ["probe", "--device", "cpu", "--", sys.executable, "-c", code, "{batch_size}"])
    assert done.exit_code == 4
    assert "about 1\n" in done.stderr
    assert "KeyError: 'column 7'" in done.stderr.splitlines()[-1]


PLAIN = [sys.executable, str(SCRIPTS / "plain.py")]
ACCUMULATING = ["--accumulation-steps", "{accumulation_steps}", *SIZES]


@pytest.mark.slow
def test_a_trial_that_accumulates_holds_the_gradients_of_the_first_micro_batch(log):
    gradient_bytes = sum(4 * parameter.numel() for parameter in plain.model_of(1024, "cpu").parameters())
    peaks = {}
    for effective in (5000, 5001):
        words = [*PLAIN, *ACCUMULATING]
        trial = attempt(words, log, 5000, device=VirtualGPU(CARD), effective_batch_size=effective).trial
        assert (trial.batch_size, trial.steps) == (5000, 2)
        peaks[effective] = trial.measurement.peak_allocated_bytes
    assert peaks[5001] - peaks[5000] == pytest.approx(gradient_bytes, rel=0.05)


@pytest.mark.slow
def test_an_effective_batch_from_the_shell_gives_a_command_that_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    card, path = "memory=1GiB,capability=8.0", tmp_path / "result.json"
    options = ["--gpu", card, "--effective-batch-size", "45000", "--start", "20000", "--multiple-of", "5000"]
    words = [*PLAIN, "--samples", "100000", *ACCUMULATING]
    done = CliRunner().invoke(main, ["probe", *options, "--json", str(path), "--", *words])
    assert done.exit_code == 0, done.output
    result = BatchSizeResult.from_json(path.read_text())
    assert (result.batch_size, result.smallest_failure) == (20000, 25000)
    # Tried with two micro-batches a step, and confirmed with as many as there will be.
    log = Path(result.environment["log"]).read_text()
    assert re.findall(r"batch 20000(, confirming)?.* --accumulation-steps (\d+) ", log) == [
        ("", "2"),
        (", confirming", "3"),
    ]
    plan_line, use_line = done.stdout.splitlines()[-2:]
    assert plan_line == "  Plan:    45000 = 15000 samples x 3 steps; 20000 fit while gradients accumulate"
    use = use_line.removeprefix("  Use it:  ").replace("{scratch}", str(tmp_path)).split()
    assert use == [*words[:-6], "--accumulation-steps", "3", "--batch-size", "15000", "--out", str(tmp_path)]
    trained = [sys.executable, "-m", "autobatch", "run", "--gpu", card, "--", *use]
    assert subprocess.run(trained, capture_output=True, timeout=120, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_the_ranks_of_a_command_share_the_effective_batch(log):
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPTS / "ranks.py")]
    command = Command([*torchrun, *ACCUMULATING], effective_batch_size=4000, log=log)
    result = find(command, device=VirtualGPU(CARD, count=2), start=2000)
    assert (result.batch_size, result.proof, result.environment["ranks"]) == (4000, "max_batch_size", 2)
    told = [line.split("--accumulation-steps ")[1].split()[0] for line in log.read_text().splitlines() if "===" in line]
    # 2000 on each of two ranks are the whole, which only its first run told.
    assert told == ["2", *["1"] * (len(told) - 1)]
    with pytest.raises(InvalidArgumentError, match="must be at least 2, a sample for each rank"):
        find(Command(command.words, effective_batch_size=1, log=log), device=VirtualGPU(CARD, count=2))


@pytest.mark.slow
def test_inputs_that_a_trainer_takes_to_the_device_at_once_count_in_the_confirmation(log):
    """The Trainer of transformers takes those of all micro-batches of a step."""
    words = [sys.executable, str(SCRIPTS / "with_transformers.py"), *ACCUMULATING]
    command = Command(words, effective_batch_size=65536, log=log)
    with closing(CommandExecutor(command, VirtualGPU(CARD))) as executor:
        trial = executor.run(TrialRequest(batch_size=64, steps=2)).trial
        (confirmed,) = executor.confirm((TrialRequest(batch_size=64, steps=2, history="a fresh start"),))
    inputs_bytes = 2 * 8 * with_transformers.TOKENS * 65536  # token numbers and labels
    more_bytes = confirmed.trial.measurement.peak_allocated_bytes - trial.measurement.peak_allocated_bytes
    assert more_bytes == pytest.approx(inputs_bytes, rel=0.1)


@pytest.mark.slow
def test_a_data_set_that_ends_is_no_larger_batch(log):
    words = [sys.executable, str(SCRIPTS / "plain.py"), *SIZES, "--samples", "100", "--features", "8"]
    trial = attempt(words, log, 128).trial
    assert (trial.outcome, trial.message) == (Outcome.LIMIT, "its data set has only 100 samples")


@pytest.mark.slow
def test_a_search_that_ends_at_the_data_says_so():
    words = [sys.executable, str(SCRIPTS / "plain.py"), *SIZES, "--samples", "40", "--features", "8"]
    result = find(Command(words), device="cpu", memory_limit="1GiB", cache=False)
    assert (result.batch_size, result.proof, result.smallest_failure) == (40, "dataset", None)
    assert "the data set has no more samples" in result.conclusion


def build_plain(device: str) -> Workload:
    model = plain.model_of(1024, device)

    def sample(n: int) -> Any:
        return torch.zeros(n, 1024), torch.zeros(n, dtype=torch.long)

    return Workload(model, torch.optim.AdamW(model.parameters()), torch.nn.functional.cross_entropy, sample)


class LossAlone(torch.nn.Module):
    """As the Trainer has it: of the outputs nothing but the loss outlives the forward pass, so no logits do."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss


def build_gpt2(device: str) -> Workload:
    model = LossAlone(with_transformers.gpt2().to(device))

    def sample(n: int) -> Any:
        ids = torch.zeros(n, with_transformers.TOKENS, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    return Workload(model, torch.optim.AdamW(model.parameters(), fused=True), sample=sample, max_grad_norm=1.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("words", "build", "ranks"),
    [
        ([sys.executable, SCRIPTS / "plain.py", "--workers", "2"], build_plain, 1),
        ([BIN / "torchrun", "--standalone", "--nproc-per-node", "2", SCRIPTS / "ranks.py"], build_plain, 2),
        ([BIN / "accelerate", "launch", SCRIPTS / "accelerated.py"], build_plain, 1),
        ([sys.executable, SCRIPTS / "with_lightning.py"], build_plain, 1),
        ([sys.executable, SCRIPTS / "with_transformers.py"], build_gpt2, 1),
    ],
    ids=["plain", "torchrun", "accelerate", "lightning", "transformers"],
)
def test_the_answer_is_that_of_the_same_step_in_process(words, build, ranks, log):
    here = find(build, device=CARD)
    start = here.batch_size * 3 // 4
    command = Command([*map(str, words), *SIZES], log=log)
    found = find(command, device=VirtualGPU(CARD, count=ranks), start=start)
    assert found.batch_size == pytest.approx(here.batch_size, rel=0.02)
