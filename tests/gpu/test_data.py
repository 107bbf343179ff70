"""The user's data on a GPU: lengths that differ, averaged weights, evaluation that needs more than training."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from autobatch import Workload, find
from autobatch.device.cuda import CudaDevice
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.units import MIB
from autobatch.virtual.device import VirtualGPU
from benchmarks.cells import VARIABLE_CELLS, Cell

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
WIDTH = 1024


def workload(sample: Any, *, average: bool = False, **options: Any) -> Workload:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))).to(DEVICE)
    ema = torch.optim.swa_utils.AveragedModel(model) if average else None
    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(model, optimizer, lambda out, batch: out.sum(), sample, ema=ema, **options)


def peak_of(made: Workload, mode: str = "train", batch_size: int = 1024) -> int:
    """Peak allocated bytes of a trial."""
    device = CudaDevice(DEVICE)
    made.begin()
    trial = run_trial(made, device, TrialRequest(batch_size=batch_size, steps=3, mode=mode)).trial
    assert trial.fits
    return trial.measurement.peak_allocated_bytes


def test_an_average_of_the_weights_is_counted() -> None:
    plain = peak_of(workload(lambda n: torch.zeros(n, WIDTH)))
    made = workload(lambda n: torch.zeros(n, WIDTH), average=True)
    assert peak_of(made) >= plain + sum(tensor.nbytes for tensor in made.model.parameters())


def test_outputs_that_are_kept_are_counted() -> None:
    plain = peak_of(workload(lambda n: torch.zeros(n, WIDTH)))
    kept = peak_of(workload(lambda n: torch.zeros(n, WIDTH), keep_outputs=8))
    # The last output is alive in either case.
    assert kept >= plain + 7 * 1024 * WIDTH * 4


def test_accumulation_holds_the_gradients_of_the_first_micro_batch() -> None:
    plain = peak_of(workload(lambda n: torch.zeros(n, WIDTH)), batch_size=8192)
    both = peak_of(workload(lambda n: torch.zeros(n, WIDTH), accumulate=True), batch_size=8192)
    assert both > plain


def test_an_example_batch_and_a_data_set_need_what_a_function_does() -> None:
    made = [lambda n: torch.zeros(n, WIDTH), torch.zeros(48, WIDTH), TensorDataset(torch.zeros(1024, WIDTH))]
    options: list[dict[str, Any]] = [{}, {}, {"collate_fn": lambda samples: torch.stack([x for (x,) in samples])}]
    peaks = [peak_of(workload(sample, **more)) for sample, more in zip(made, options, strict=True)]
    assert len(set(peaks)) == 1


def test_evaluation_that_needs_more_than_training_has_its_own_answer() -> None:
    def evaluate(n: int) -> None:
        torch.empty(n, 4 * MIB, dtype=torch.uint8, device=DEVICE)

    made = workload(lambda n: torch.zeros(n, WIDTH), evaluate=evaluate, mode="both")
    result = find(made, device=DEVICE, memory_limit="1GiB", max_batch_size=1000)
    assert (result.batch_size, result.proof) == (1000, "max_batch_size")
    assert 150 < result.eval_batch_size < 256
    assert {trial.mode for trial in result.trials if not trial.fits} == {"eval"}
    assert all(note.startswith("Evaluation: ") for note in result.notes)


def _fails(cell: Cell, size: int, seeds: int) -> list[int]:
    """In which of so many shuffled orders ``size`` does not survive 20 steps and the worst batch, each in a fresh
    process that has the whole card.
    """
    gpu = VirtualGPU(cell.card)
    failed = []
    with closing(ChildExecutor(cell.build, gpu.isolation())) as executor:
        for seed in range(100, 100 + seeds):
            if not executor.run(TrialRequest(batch_size=size, steps=20, shuffle_seed=seed)).trial.fits:
                failed.append(seed)
            executor._retire()
    return failed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cell", VARIABLE_CELLS[:1], ids=lambda cell: cell.name)
def test_an_answer_for_lengths_that_differ_survives_shuffled_epochs_it_has_not_seen(cell: Cell) -> None:
    result = find(cell.build, device=cell.card)
    assert result.batch_size >= 40
    assert (result.trial_count <= 8, result.oom_count <= 3) == (True, True), result
    assert [trial.history for trial in result.confirmation][-1].startswith("shuffled epoch")
    assert _fails(cell, result.batch_size, 20) == []
