"""The first guess for a real GPU: a virtual one of its size answers in a child process, and the search begins there.

Where there is no real GPU, the virtual one stands in for it: it says that it is real.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autobatch import Workload, find
from autobatch.device import cuda

pytestmark = pytest.mark.gpu


def build(device: str) -> Workload:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(model, optimizer, nn.functional.mse_loss, lambda n: (torch.zeros(n, 1024), torch.zeros(n, 1024)))


@pytest.fixture(autouse=True)
def _says_it_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_is_virtual", lambda: False)


def answered(**options: Any) -> Any:
    return find(build, device="cuda:0", memory_limit="2GiB", **options)


def test_the_search_begins_at_the_answer_of_a_virtual_gpu() -> None:
    result = answered(isolate=True)
    (said,) = [note for note in result.notes if "began at" in note]
    assert said == f"The search began at {result.trials[0].batch_size}, the answer of a virtual GPU of the same size."
    assert result.trial_count <= 4
    assert result.batch_size == answered(isolate=True, first_guess=result.batch_size).batch_size


def test_a_guess_of_the_caller_s_own_is_not_asked_for_again() -> None:
    assert not [note for note in answered(isolate=True, first_guess=64).notes if "began at" in note]


def test_live_objects_cannot_be_had_in_a_child_and_are_searched_as_ever() -> None:
    result = find(build("cuda:0"), device="cuda:0", memory_limit="2GiB")
    assert result.trials[0].batch_size == 1
    assert not [note for note in result.notes if "guess" in note or "began" in note]
