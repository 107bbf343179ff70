"""``autobatch probe`` for real: on GPUs that are not there and on host memory, from the shell and back."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from autobatch.cli import main
from autobatch.probe import finder
from autobatch.probe.processes.server import Server
from autobatch.result import BatchSizeResult

WORKLOADS = """
    import torch
    from autobatch.probe.workload import Workload

    WIDTH = 1024

    def build(device, features=WIDTH, bad_from=None):
        model = torch.nn.Sequential(*(torch.nn.Linear(features, features, device=device) for _ in range(4)))
        optimizer = torch.optim.AdamW(model.parameters())
        def sample(n):
            if bad_from is not None and n >= bad_from:
                raise KeyError(f"row {n} is missing")
            return torch.rand(n, features, device=device), torch.zeros(n, dtype=torch.long, device=device)
        return Workload(model, optimizer, torch.nn.functional.cross_entropy, sample)

    def huge(device):
        return build(device, features=40_000)

    def narrow(device):
        return build(device, features=64)

    def failing(device):
        return build(device, bad_from=4)

    def dying(device):
        raise SystemExit(7)
"""

MANY = 16_384

# Trains as the target does, without autobatch: the truth to hold the answer against.
TRAIN_GPT2 = """
    import sys, torch, transformers
    config = transformers.GPT2Config(use_cache=False)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(20):
        ids = torch.randint(config.vocab_size, (int(sys.argv[1]), 1024), device="cuda")
        model(input_ids=ids, labels=ids.clone()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workloads") / "workloads_of_mine.py"
    path.write_text(textwrap.dedent(WORKLOADS))
    return path


def probe(*arguments: object):
    return CliRunner().invoke(main, ["probe", *map(str, arguments)])


def shell(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobatch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def noted_events(patch: pytest.MonkeyPatch) -> list[str]:
    """When servers of trials are started, and searches: the one that begins before the search is what it asks."""
    told: list[str] = []
    start, search = Server.__init__, finder.find
    patch.setattr(Server, "__init__", lambda self, *args: (told.append("server"), start(self, *args))[1])
    patch.setattr(finder, "find", lambda *args, **options: (told.append("search"), search(*args, **options))[1])
    return told


@pytest.fixture(scope="module")
def capped(script: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BatchSizeResult, list[str]]:
    """What a probe finds that ends at a cap, where none of this machine's GPUs is visible, and its events."""
    path = tmp_path_factory.mktemp("capped") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        events = noted_events(patch)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        done = probe(f"{script}:build", "--gpu", "t4", "--max-batch-size", MANY, "--start", MANY, "--json", path)
    assert done.exit_code == 0, done.output
    return BatchSizeResult.from_json(path.read_text()), events


@pytest.fixture(scope="module")
def gpt2_on_a100(tmp_path_factory: pytest.TempPathFactory) -> tuple[BatchSizeResult, list[str], float]:
    """The result, the lines and the CPU seconds of the command that the README opens with."""
    path = tmp_path_factory.mktemp("result") / "result.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("probe", "hf:gpt2", "--seq-len", "1024", "--device", "a100-40gb", "--json", path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return BatchSizeResult.from_json(path.read_text()), done.stdout.splitlines(), cpu_s


class TestGPT2OnAnA100ThatIsNotThere:
    def test_it_is_quick(self, gpt2_on_a100):
        # CPU seconds, one after the other for the most part: the clock of a busy machine would say nothing.
        assert gpt2_on_a100[2] < 20

    def test_what_is_printed_is_what_was_found(self, gpt2_on_a100):
        result, lines, _ = gpt2_on_a100
        assert lines[0].startswith("Device: NVIDIA A100-SXM4-40GB (cuda:0, virtual: ")
        trials = [re.match(r"trial=\d+ batch_size=(\d+) outcome=(\w+) ", line) for line in lines]
        shown = [(int(match[1]), match[2]) for match in trials if match]
        # In the order of events: a confirmation that fails is followed by further trials.
        assert sorted(shown) == sorted((t.batch_size, t.outcome.value) for t in (*result.trials, *result.confirmation))
        assert lines[-2].startswith(f"Largest batch on NVIDIA A100-SXM4-40GB (virtual): {result.batch_size} (")
        assert result.environment["virtual"] is True

    @pytest.mark.slow
    def test_training_of_ones_own_fits_at_the_answer_and_not_far_above(self, gpt2_on_a100, tmp_path):
        size = gpt2_on_a100[0].batch_size
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(TRAIN_GPT2))

        def train(n: int) -> subprocess.CompletedProcess[str]:
            return shell("run", "--gpu", "a100-40gb", "--", sys.executable, path, n)

        assert train(size).returncode == 0
        beyond = train(size * 5 // 4)
        assert beyond.returncode == 1
        assert "CUDA out of memory" in beyond.stderr


class TestCodes:
    def test_0_and_the_result_in_json(self, capped):
        result, events = capped
        assert events == ["server", "search"]
        assert (result.batch_size, result.proof) == (MANY, "max_batch_size")

    def test_which_of_this_machines_gpus_are_visible_is_no_matter_to_a_virtual_one(self, capped):
        assert capped[0].environment["virtual"]

    def test_1_says_how_much_the_model_needs(self, script):
        done = probe(f"{script}:huge", "--gpu", "t4")
        assert done.exit_code == 1
        needed_bytes = 4 * 4 * 40_000 * 40_001
        assert str(needed_bytes) in done.stderr

    def test_2_an_unknown_architecture_lists_the_nearest(self):
        done = probe("hf:gtp2", "--gpu", "t4")
        assert done.exit_code == 2
        assert done.stderr.startswith("Error: TARGET hf:gtp2: must be ")
        assert "gpt2" in done.stderr

    def test_3_an_unknown_gpu_lists_the_nearest(self):
        done = probe("hf:gpt2", "--gpu", "a100-40gbb")
        assert done.exit_code == 3
        assert "a100-40gb" in done.stderr

    def test_4_with_the_workloads_own_traceback(self, script):
        done = probe(f"{script}:failing", "--gpu", "t4")
        assert done.exit_code == 4
        frames = [line for line in done.stderr.splitlines() if line.startswith("  File ")]
        assert frames
        assert all("workloads_of_mine.py" in frame for frame in frames), done.stderr
        assert done.stderr.endswith("KeyError: 'row 3072 is missing'\n")

    def test_4_when_the_function_ends_the_process(self, script):
        assert probe(f"{script}:dying", "--gpu", "t4").exit_code == 4

    @pytest.mark.parametrize(
        ("number", "code", "said"),
        [
            (signal.SIGINT, 130, "interrupted"),
            pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
            pytest.param(signal.SIGHUP, 129, "terminated", marks=pytest.mark.slow),
        ],
    )
    def test_a_signal_ends_it_and_nothing_is_left(self, script, tmp_path, number, code, said):
        command = [sys.executable, "-m", "autobatch", "probe", f"{script}:build", "--gpu", "t4", "--steps", "1000"]
        before = children()
        running = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            # Tests in the background have inherited to ignore an interrupt, under nohup a hangup, and would hand it on.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )
        assert running.stdout is not None
        while not running.stdout.readline().startswith("trial="):
            assert running.poll() is None
        started = children() - before
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        assert (running.returncode, errors) == (code, f"Error: {said}\n")
        assert len(started) > 1
        assert not [pid for pid in started if psutil.pid_exists(pid)]
        assert not list(tmp_path.iterdir())


def test_with_an_effective_batch_the_trials_hold_gradients_and_the_plan_is_printed(script, tmp_path, capped):
    path = tmp_path / "result.json"
    done = probe(f"{script}:build", "--gpu", "t4", "--effective-batch-size", MANY, "--start", MANY, "--json", path)
    assert done.exit_code == 0, done.output
    results = capped[0], BatchSizeResult.from_json(path.read_text())
    less_bytes, more_bytes = (result.trials[0].measurement.peak_allocated_bytes for result in results)
    gradient_bytes = 4 * 4 * 1024 * 1025
    assert more_bytes - less_bytes == pytest.approx(gradient_bytes, rel=0.05)
    assert "16384 (an effective batch of 16384 takes no more)" in done.stdout
    assert done.stdout.splitlines()[-2] == "  Plan:    16384 = 16384 samples x 1 step"


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux alone")
def test_on_the_host_the_limit_is_named_and_kept(script, monkeypatch):
    events = noted_events(monkeypatch)
    # Narrow layers: much memory for little arithmetic, so that a loaded machine is done with it soon.
    done = probe(f"{script}:narrow", "--device", "cpu", "--memory-limit", "24MiB", "--multiple-of", 1024)
    assert done.exit_code == 0, done.output
    assert events == ["server", "search"]
    lines = done.stdout.splitlines()
    assert "budget 24 MiB, the limit given" in lines[0]
    # What malloc keeps differs from process to process: a size at the edge may fit once and not again.
    answer = re.search(r"Largest batch on host memory: (\d+) \(\d+ (does not fit|did not keep fitting)\)", lines[-2])
    assert answer, done.stdout
    size = int(answer[1])
    # A sample takes at least what four layers keep of it.
    assert 1024 <= size < 24 * 2**20 // (4 * 4 * 64)


@pytest.mark.slow
def test_precision_checkpointing_and_mode_reach_the_trials(tmp_path):
    sizes = {}
    for name, options in {"plain": [], "less": ["--grad-checkpointing", "--precision", "bf16"]}.items():
        path = tmp_path / f"{name}.json"
        done = probe(
            "timm:vit_small_patch16_224",
            "--gpu",
            "memory=4GiB,capability=8.6",
            "--mode",
            "both",
            "--json",
            path,
            *options,
        )
        assert done.exit_code == 0, done.output
        sizes[name] = BatchSizeResult.from_json(path.read_text())
    assert sizes["less"].batch_size > 2 * sizes["plain"].batch_size
    for result in sizes.values():
        assert result.eval_batch_size > result.batch_size


def test_a_target_in_a_module_is_found_from_the_working_folder(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    done = shell("probe", "workloads_of_mine:build", "--gpu", "t4", "--max-batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "Target: workloads_of_mine:build" in done.stdout
