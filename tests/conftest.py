"""Which GPU the tests run on: a real one if there is one, else a virtual one that is attached here.

Tests that need a GPU in their own process carry the mark ``gpu`` and run in a session of their own (``pytest -m gpu``,
or by naming files under ``tests/gpu``), because a process that has a GPU is another process for everybody else's tests.
"""

from __future__ import annotations

import gc
import glob
import importlib
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from autobatch.imports import without_collections
from autobatch.probe.cache import CACHE_VARIABLE
from autobatch.probe.lock import HELD_VARIABLE, lock_path_of
from autobatch.pytest_plugin import attach
from autobatch.virtual.attach import present_state

CARD = "a100-40gb"
_GPU_FOLDER = Path(__file__).parent / "gpu"
_GPU_MARKS, _OTHER_MARKS = ("gpu", "gpu_values"), ("slow", "distributed")


@pytest.fixture(autouse=True, scope="session")
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs leave where temporary files are kept (torchrun leaves a folder) goes with pytest's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(autouse=True, scope="module")
def _answers_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures of a module, which are made before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("answers")))
        yield


@pytest.fixture(autouse=True)
def _answers_of_this_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the answer of another, nor leaves one in the user's own cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("answers")))


@pytest.fixture(autouse=True, scope="module")
def _nothing_stays_on_the_gpu() -> Iterator[None]:
    """Streams' workspaces and graphs' pools of one module are no part of what the next one measures."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What runs in the background has inherited to ignore an interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def has_real_gpu() -> bool:
    # Without torch, which would make it too late to attach, and without NVML, which is the driver's own.
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))


def pytest_configure(config: pytest.Config) -> None:
    # Where tests run in workers, each attaches a card of its own: what their starter has, they would share.
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if runs_tests and _only_gpu_tests(config) and not has_real_gpu() and present_state() is None:
        attach(CARD)
    if os.environ.get("AUTOBATCH_REQUIRE_GPU") and has_real_gpu() and hasattr(config, "workerinput"):
        # Workers share it (make gpu): a search of one, under a limit of its own, does not wait for another's.
        os.environ[HELD_VARIABLE] = str(lock_path_of("cuda", 0))


def _only_gpu_tests(config: pytest.Config) -> bool:
    if config.args and all(Path(arg.split("::")[0]).resolve().is_relative_to(_GPU_FOLDER) for arg in config.args):
        return True
    expression = config.getoption("markexpr")
    others = [set(marks) for n in range(3) for marks in itertools.combinations(_OTHER_MARKS, n)]
    return (
        bool(expression)
        and not any(_selects(expression, marks) for marks in others)
        and any(_selects(expression, marks | {gpu}) for marks in others for gpu in _GPU_MARKS)
    )


def _selects(expression: str, marks: set[str]) -> bool:
    class Marks(dict[str, bool]):
        def __missing__(self, name: str) -> bool:
            return name in marks

    # pytest's own expressions are Python's, with marks for names.
    return bool(eval(expression, {"__builtins__": {}}, Marks()))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with without_collections():
        return (yield)


def pytest_collection_finish() -> None:
    """Every trial collects garbage, and what all test files together import is large and none."""
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr")
    if expression and "slow" not in expression:  # `pytest -m gpu` is the suite that takes minutes
        slow = [item for item in items if item.get_closest_marker("slow") is not None]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if has_real_gpu():
        return
    elsewhere = pytest.mark.skip(reason="needs a GPU in its process: run `pytest -m gpu`")
    no_values = pytest.mark.skip(reason="looks at computed values: needs a real GPU")
    for item in items:
        if item.get_closest_marker("gpu_values") is not None:
            if not os.environ.get("AUTOBATCH_REQUIRE_GPU"):
                item.add_marker(no_values)
        elif item.get_closest_marker("gpu") is not None and present_state() is None:
            item.add_marker(elsewhere)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu_values") is not None and not has_real_gpu():
        pytest.fail("needs a real GPU, and AUTOBATCH_REQUIRE_GPU says that there must be one")
