"""``pytest --virtual-gpu`` in sessions of its own, and how our own sessions choose their GPU."""

import glob
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def session(tmp_path, code, *arguments, **variables):
    (tmp_path / "test_it.py").write_text(code)
    # A session of ours that has a GPU hands it to its children; these are to begin without.
    ours = ("AUTOBATCH_VIRTUAL_STATE", "LD_PRELOAD", "LD_LIBRARY_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_it.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_tests_of_a_session_see_the_gpu(tmp_path):
    (tmp_path / "conftest.py").write_text("import torch\n")  # it must be attached before this
    code = "import torch\ndef test_name(): assert torch.cuda.get_device_name() == 'Tesla T4'\n"
    done = session(tmp_path, code, "--virtual-gpu", "t4")
    assert done.returncode == 0, done.stdout
    assert "GPU: Tesla T4 (virtual: every value is zero)" in done.stdout


def test_without_the_option_nothing_happens(tmp_path):
    code = (
        "import sys, os\n"
        "def test_nothing():\n"
        "    assert not {'torch', 'autobatch.virtual.attach'} & sys.modules.keys()\n"
        "    assert 'AUTOBATCH_VIRTUAL_STATE' not in os.environ\n"
    )
    done = session(tmp_path, code)
    assert done.returncode == 0, done.stdout
    assert "virtual" not in done.stdout


def test_an_unknown_name_is_a_usage_error(tmp_path):
    done = session(tmp_path, "", "--virtual-gpu", "a100")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "a100-40gb" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_late_is_a_usage_error(tmp_path):
    (tmp_path / "early.py").write_text("import torch\n")
    done = session(tmp_path, "", "-p", "early", "--virtual-gpu", "t4")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch is imported already" in done.stderr


MARKED = """
import pytest
from autobatch.virtual.attach import present_state

@pytest.mark.gpu
def test_memory(): assert present_state() is not None

@pytest.mark.gpu_values
def test_values(): pass

@pytest.mark.gpu
@pytest.mark.slow
def test_for_long(): assert present_state() is not None
"""


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia[0-9]*")), reason="there is a real GPU")
@pytest.mark.parametrize(
    ("arguments", "variables", "outcomes"),
    [
        (["-m", "gpu or gpu_values"], {}, r"1 passed, 1 skipped, 1 deselected"),
        (["-m", "gpu and slow"], {}, r"1 passed, 2 deselected"),
        (["-m", "gpu or gpu_values"], {"AUTOBATCH_REQUIRE_GPU": "1"}, r"1 passed, 1 deselected.*1 error"),
        ([], {}, r"3 skipped"),
    ],
    ids=["gpu session", "make slow", "make gpu", "plain session"],
)
def test_tests_of_values_want_a_real_gpu(tmp_path, arguments, variables, outcomes):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    assert re.search(outcomes, session(tmp_path, MARKED, *arguments, **variables).stdout)


@pytest.mark.parametrize(
    ("expression", "arguments", "expected"),
    [
        ("gpu", [], True),
        ("gpu and not slow", [], True),
        ("gpu or gpu_values", [], True),
        ("gpu and slow", [], True),
        ("", ["tests/gpu"], True),
        ("", ["tests/gpu/test_virtual_attach.py::test_x"], True),
        ("", [], False),
        ("", ["tests"], False),
        ("", ["tests/gpu", "tests/unit"], False),
        ("not gpu", [], False),
        ("not gpu and not slow", [], False),
        ("not (gpu or slow)", [], False),
        ("slow", [], False),
        ("not slow", [], False),
        ("gpu or distributed", [], False),
    ],
)
def test_a_session_of_gpu_tests_alone_gets_one(expression, arguments, expected):
    spec = importlib.util.spec_from_file_location("conftest_under_test", CONFTEST)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    paths = [str(CONFTEST.parents[1] / argument) for argument in arguments]
    config = types.SimpleNamespace(args=paths, getoption=lambda name: expression)
    assert conftest._only_gpu_tests(config) is expected
