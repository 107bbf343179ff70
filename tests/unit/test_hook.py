"""The start-up hook of ``autobatch run``, with a stand-in for torch."""

import json
import os
import subprocess
import sys

import pytest

from autobatch import hook

HOOK = hook.START
CUDA = """
class Properties: uuid = "11111111-2222-3333-4444-555555555555"
def is_initialized(): return {initialized}
def device_count(): return 1
def get_device_properties(index): return Properties
def memory_stats(index):
    return {{"allocated_bytes.all.peak": 10, "reserved_bytes.all.peak": 20, "num_alloc_retries": 3, "num_ooms": 4}}
"""


@pytest.fixture
def python(tmp_path):
    """Runs a program under the hook; gives what it printed and what was reported."""
    reports = tmp_path / "reports"
    reports.mkdir()

    def run(code, *, initialized=True, options=(), variables=()):
        package = tmp_path / "modules" / "torch"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "cuda.py").write_text(CUDA.format(initialized=initialized))
        path = os.pathsep.join([str(HOOK), str(package.parent)])
        environment = os.environ | {"PYTHONPATH": path, "AUTOBATCH_RUN_REPORTS": str(reports)} | dict(variables)
        command = [sys.executable, *options, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, [json.loads(file.read_text()) for file in reports.iterdir() if file.is_file()]

    run.modules = tmp_path / "modules"
    return run


def test_writes_what_the_process_used_at_its_end(python):
    done, [report] = python("import os, torch.cuda; print(os.getpid())")
    assert report["pid"] == int(done.stdout)
    assert report["command"][0] == sys.executable
    assert report["cards"] == {
        "11111111-2222-3333-4444-555555555555": {
            "peak_allocated_bytes": 10,
            "peak_reserved_bytes": 20,
            "retries": 3,
            "out_of_memory": 4,
        }
    }


def test_also_when_the_program_fails(python):
    done, reports = python("import sys, torch.cuda; sys.exit(7)")
    assert (done.returncode, len(reports)) == (7, 1)
    done, _ = python("import torch.cuda; raise ValueError('its own')")
    assert done.returncode == 1
    assert "ValueError: its own" in done.stderr


@pytest.mark.parametrize(
    ("code", "initialized"),
    [("pass", True), ("import torch.cuda", False), ("import os, torch.cuda; os._exit(0)", True)],
)
def test_writes_nothing_where_there_is_nothing_to_tell(python, code, initialized):
    done, reports = python(code, initialized=initialized)
    assert (done.returncode, done.stdout, done.stderr, reports) == (0, "", "", [])


def test_isolated_interpreters_run_without_it(python):
    done, reports = python("print(1)", options=["-I"])
    assert (done.stdout, done.stderr, reports) == ("1\n", "", [])


def test_runs_the_sitecustomize_that_it_hides(python):
    python.modules.mkdir()
    (python.modules / "sitecustomize.py").write_text("import builtins; builtins.hidden = __file__")
    done, reports = python("import torch.cuda, sitecustomize; print(hidden, sitecustomize.__file__)")
    assert done.stdout.split() == [str(python.modules / "sitecustomize.py")] * 2
    assert len(reports) == 1


def test_an_error_of_the_hidden_one_is_shown_as_ever(python):
    python.modules.mkdir()
    (python.modules / "sitecustomize.py").write_text("raise RuntimeError('theirs')")
    done, reports = python("import torch.cuda")
    assert "Error in sitecustomize" in done.stderr
    assert "theirs" in done.stderr
    assert (done.returncode, len(reports)) == (0, 1)


def test_costs_no_import_of_torch(python):
    done, _ = python("import sys; print('torch' in sys.modules, 'sitecustomize' in sys.modules)")
    assert done.stdout.split() == ["False", "True"]


def test_a_report_that_cannot_be_written_is_said_and_harms_nothing(python):
    done, _ = python(
        "import os, torch.cuda; os.mkdir(os.path.join(os.environ['AUTOBATCH_RUN_REPORTS'], f'{os.getpid()}.json'))"
    )
    assert done.returncode == 0
    assert "could not be written" in done.stderr


def test_a_process_that_outlives_the_run_is_silent(python, tmp_path):
    done, _ = python("import torch.cuda", variables={"AUTOBATCH_RUN_REPORTS": str(tmp_path / "gone")})
    assert (done.returncode, done.stderr) == (0, "")


TORCH = "import os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"


@pytest.fixture
def trial(tmp_path):
    """Runs a program as part of a trial, with a torch that only says what its allocator is told; gives the output."""
    folder, modules = tmp_path / "trial", tmp_path / "modules"
    (modules / "torch").mkdir(parents=True)
    (modules / "torch" / "__init__.py").write_text(TORCH)
    folder.mkdir()
    os.mkfifo(folder / "alive")
    (folder / "request.json").write_text(json.dumps({"fraction": 0.5, "kind": "cpu", "limit_bytes": None}))
    reader = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(folder / "alive", os.O_WRONLY)

    def run(code, *, alive=True, **variables):
        nonlocal writer
        if not alive:
            os.close(writer)
            writer = None
        path = os.pathsep.join([str(HOOK), str(modules)])
        environment = os.environ | {"PYTHONPATH": path, "AUTOBATCH_TRIAL": str(folder)} | variables
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    run.folder = folder
    yield run
    os.close(reader)
    if writer is not None:
        os.close(writer)


def test_a_process_of_a_trial_says_that_it_was_reached(trial):
    assert trial("print(1)").stdout == "1\n"
    (record,) = (json.loads(path.read_text()) for path in trial.folder.glob("[0-9]*.json"))
    assert (record["steps"], record["done"]) == (0, False)


def test_a_process_ends_where_nobody_holds_the_pipe_or_there_is_none(trial):
    assert trial("import time; time.sleep(60)", alive=False).returncode == -9
    assert trial("print(1)", AUTOBATCH_TRIAL=str(trial.folder / "gone")).stdout == ""


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({}, "per_process_memory_fraction:0.5"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2],expandable_segments:True"},
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:True,per_process_memory_fraction:0.5",
        ),
        ({"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.25"}, "per_process_memory_fraction:0.25"),
    ],
)
def test_the_limit_is_added_to_what_the_command_tells_the_allocator_itself(trial, theirs, told):
    # Also in the program itself, as late as may be; and a look for torch that imports nothing changes nothing.
    code = f"import os, importlib.util; importlib.util.find_spec('torch'); os.environ.update({theirs!r}); import torch"
    assert trial(code).stdout == told + "\n"


@pytest.mark.parametrize("command", ["pass", "gc.disable()"])
def test_nothing_is_collected_while_torch_is_imported_and_then_as_before(trial, command):
    (trial.folder.parent / "modules" / "torch" / "__init__.py").write_text("import gc; print(gc.isenabled())")
    # The stand-in for torch has no optimizers to attach to.
    done = trial(f"import gc; {command}; print(gc.isenabled())\ntry: import torch\nfinally: print(gc.isenabled())")
    before, inside, after = done.stdout.split()
    assert (inside, after) == ("False", before)


@pytest.mark.parametrize(
    ("code", "tier"),
    [
        ("raise MemoryError('all gone')", "definite"),
        ("raise KeyError('x') from RuntimeError('CUDA out of memory. Tried')", "definite"),
        ("import sys; sys.excepthook = print; raise MemoryError", "definite"),
        ("import sys\ntry: raise MemoryError\nexcept MemoryError: sys.exit(3)", "definite"),
        ("raise ValueError('CUDA out of memory')", None),
    ],
)
def test_the_exception_that_ends_a_process_is_classified_there(trial, code, tier):
    trial(code)
    (record,) = (json.loads(path.read_text()) for path in trial.folder.glob("[0-9]*.json"))
    assert record["failure"]["tier"] == tier
