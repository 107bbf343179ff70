"""The first guess for a real GPU: a virtual one of its size answers in a child process, and the search begins there.

Where there is no real GPU, the virtual one stands in for it: it says that it is real.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autobatch import Workload, find
from autobatch.device import nvml
from autobatch.probe import guess
from autobatch.probe.command import Command
from autobatch.probe.executor import Setting
from autobatch.probe.guess import Guess, virtual_guess
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes.server import Server
from autobatch.probe.search.rounding import Rounding
from autobatch.probe.source import source_of
from autobatch.virtual.catalog import find_card
from autobatch.virtual.resolve import resolve_device
from tests.conftest import has_real_gpu
from tests.gpu.machines import in_new_process

pytestmark = pytest.mark.gpu


def build(device: str) -> Workload:
    """Samples are small, to be quickly made on the host, and take much on the GPU."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(model, optimizer, nn.functional.mse_loss, lambda n: (torch.zeros(n, 64), torch.zeros(n, 64)))


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ChildExecutor.setting

    def as_of_a_real_one(self: ChildExecutor) -> Setting:
        setting = told(self)
        return replace(setting, environment={**setting.environment, "virtual": False})

    monkeypatch.setattr(ChildExecutor, "setting", as_of_a_real_one)


def answered(**options: Any) -> Any:
    return find(build, device="cuda:0", memory_limit="2GiB", **options)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When processes for trials were started, and when they were waited for."""
    told: list[str] = []
    began, waited = Server.__init__, Server.ready
    monkeypatch.setattr(Server, "__init__", lambda self, *args: (told.append("begin"), began(self, *args))[1])
    monkeypatch.setattr(Server, "ready", lambda self: (told.append("wait"), waited(self))[1])
    monkeypatch.setattr(guess, "present_state", lambda: None)  # the GPU is taken for a real one here too
    return told


def test_the_search_begins_at_the_answer_of_a_virtual_gpu(real: None, events: list[str]) -> None:
    """Whose processes import while those of the real one do."""
    result = answered(isolate=True)
    assert events == ["begin", "begin", "wait", "wait"]
    first = result.trials[0].batch_size
    assert f"A virtual GPU of the same size answers {first}: the search began from there." in result.notes
    assert result.trial_count <= 4
    assert result.batch_size == answered(isolate=True, first_guess=result.batch_size).batch_size
    assert events[4:] == ["begin", "wait"]


@pytest.mark.slow
def test_a_gpu_that_is_not_what_its_name_says_has_another_virtual_gpu(
    real: None, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(find_card("t4"), title=nvml.list_gpus()[0].name)
    monkeypatch.setattr(guess, "cards", lambda: (other,))
    result = answered(isolate=True, max_batch_size=512)
    assert events == ["begin", "begin", "wait", "begin", "wait"]
    assert [note for note in result.notes if "began from there" in note]


@pytest.mark.slow
def test_a_guess_of_the_caller_s_own_is_not_asked_for_again(real: None) -> None:
    assert not [note for note in answered(isolate=True, first_guess=64).notes if "began" in note]


def test_a_command_has_no_twin_ahead(events: list[str]) -> None:
    """Which would take the place of its log."""
    with guess.twin_ahead(Command([sys.executable, "train.py", "{batch_size}"]), resolve_device("cuda:0")) as ahead:
        assert ahead is None
    with guess.twin_ahead(build, resolve_device("cuda:0")) as ahead:
        assert ahead is not None
    assert events == ["begin"]


def test_a_card_for_which_torch_has_no_kernels_is_no_error_of_the_caller_s() -> None:
    card = "memory=1GiB,capability=7.0,outside=0"
    guess = Guess(batch_size=1, smallest=1)
    assert virtual_guess(source_of(lambda n: None, ()), card, lambda executor: guess) == (None, "")


def test_where_nothing_may_fail_the_search_stays_below_the_answer_of_a_virtual_gpu(real: None) -> None:
    result = answered(isolate=True, avoid_oom=True)
    (said,) = [note for note in result.notes if "began" in note]
    answer = int(said.split("answers ")[1].split(":")[0])
    assert result.trials[0].batch_size == Rounding("auto").down(int(0.97 * answer))
    assert (result.oom_count, result.proof) == (0, "memory_model")
    assert 0.95 * answer <= result.batch_size <= answer


@pytest.mark.slow
@pytest.mark.skipif(has_real_gpu(), reason="a virtual GPU is asked for by its name, and here is another")
def test_another_virtual_gpu_fails_in_place_of_one_where_nothing_may() -> None:
    careful, bold = (find(build, device="memory=1GiB,capability=8.0", avoid_oom=avoid) for avoid in (True, False))
    assert bold.oom_count > 0
    assert (careful.oom_count, careful.proof) == (0, "memory_model")
    assert careful.batch_size == bold.batch_size


def test_live_objects_cannot_be_had_in_a_child_and_are_searched_as_ever(real: None) -> None:
    result = find(build("cuda:0"), device="cuda:0", memory_limit="2GiB")
    assert result.trials[0].batch_size == 1
    assert not [note for note in result.notes if "guess" in note or "began" in note]


def test_the_process_that_asks_takes_nothing_of_the_gpu() -> None:
    """Trials in another process would have so much less: a context takes hundreds of MiB."""
    code = (
        "import torch, autobatch\n"
        "from tests.gpu.test_guess import build\n"
        "found = autobatch.find(build, device='cuda:0', isolate=True, max_batch_size=4, cache=False)\n"
        "print(found.batch_size, torch.cuda.is_initialized())\n"
    )
    assert in_new_process(code) == "4 False\n"
