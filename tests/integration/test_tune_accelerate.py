"""tune() of a loop around an Accelerator: real values on the CPU, in little memory and in plenty."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autobatch
from autobatch.errors import AutobatchError, InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations import accelerate as integration
from autobatch.integrations.loaders import source_of
from autobatch.probe.state import fingerprint
from tests.integration.under_limit import ROOT, run

QUICK: dict[str, Any] = {"max_batch_size": 8, "start": 8}
"""Two trials and a confirmation, for what does not depend on the answer."""


@pytest.fixture(autouse=True, scope="module")
def _versions() -> Iterator[None]:
    print(f"accelerate {version('accelerate')}, torch {torch.__version__}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_accelerator_of_another_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


SCRIPT = Path(__file__).parent / "accelerate_under_limit.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_without_it_the_stated_batch_runs_out() -> None:
    done = run(SCRIPT, "plain")
    assert done.returncode == 1
    assert "DefaultCPUAllocator: can't allocate memory" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_with_the_one_line_it_trains_to_the_end_with_the_gradients_of_the_whole_batch() -> None:
    done = run(SCRIPT, "tuned")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == [256] * 4
    assert told["all_seen"]
    assert told["error"] < 1e-5
    (micro,) = told["micro_batches"]
    assert told["set"] == [micro, 256 // micro]
    assert 4 <= micro < 256


def made(
    *, batch_size: int = 32, norm: type[nn.Module] = nn.BatchNorm1d, **options: Any
) -> tuple[Accelerator, Any, Any, Any]:
    """An accelerator, and what it has prepared."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, **options)
    model = nn.Sequential(nn.Linear(6, 16), norm(16), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(rows, batch_size, shuffle=True))


def trained(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, *, epochs: int = 1) -> str:
    """What a loop ends with, the random numbers too."""
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return fingerprint(model, optimizer)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_trains_bit_for_bit_as_with_these_numbers_by_hand(precision: str) -> None:
    accelerator, model, optimizer, loader = made(mixed_precision=precision)
    result = autobatch.tune(
        accelerator, model, loader, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(), effective_batch_size=32, **QUICK
    )
    assert result.batch_size == 8
    assert result.environment["accumulation"]["steps"] == accelerator.gradient_accumulation_steps == 4
    assert result.notes[-2:] == (
        "An optimizer step is 32 = 8 samples x 4 steps.",
        "The batch size was set on the loader, 8, and gradient_accumulation_steps on the accelerator, 4.",
    )
    assert (len(loader), loader.total_batch_size) == (8, 8)
    tuned = trained(accelerator, model, optimizer, loader, epochs=2)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    by_hand = made(batch_size=8, gradient_accumulation_steps=4, mixed_precision=precision)
    assert trained(*by_hand, epochs=2) == tuned


def test_without_an_effective_batch_nothing_accumulates() -> None:
    accelerator, model, optimizer, loader = made(gradient_accumulation_steps=5)
    autobatch.tune(accelerator, model, loader, optimizer=optimizer, loss_fn=nn.functional.cross_entropy, **QUICK)
    assert (accelerator.gradient_accumulation_steps, loader.batch_sampler.batch_size) == (1, 8)


def test_what_is_there_before_is_there_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    accelerator, model, optimizer, loader = made(project_dir=str(tmp_path))
    trained(accelerator, model, optimizer, loader)  # so that there is a state to lose, and gradients of an epoch after
    nn.functional.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()

    def everything() -> tuple[Any, ...]:
        kept = (model, optimizer, optimizer.optimizer.state, loader.batch_sampler.sampler.generator)
        plain = {name: value for name, value in vars(loader).items() if name != "base_dataloader"}
        plugin = {**accelerator.gradient_state.plugin_kwargs, "num_steps": None}
        others = {name: repr(value) for name, value in vars(accelerator).items() if name != "gradient_state"}
        seen = (accelerator.sync_gradients, accelerator.gradient_state.in_dataloader, loader.iteration, plugin)
        return fingerprint(*kept), plain, others, seen, sorted(os.environ.items())

    before = everything()
    assert before[0] == everything()[0]
    capfd.readouterr()
    caplog.clear()
    autobatch.tune(
        accelerator, model, loader, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(), effective_batch_size=16, **QUICK
    )
    assert everything() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trials_amid_this_process_leave_everything_as_it_was(precision: str) -> None:
    """As on a GPU, where a trial is no fork."""
    accelerator, model, optimizer, loader = made(mixed_precision=precision)
    workload = integration._Loop(accelerator, model, source_of(loader), [optimizer], nn.CrossEntropyLoss(), 32)
    before = fingerprint(model, optimizer, vars(optimizer))
    found = autobatch.find(workload, device="cpu", isolate=False, **QUICK)
    assert (found.batch_size, found.environment["trials_in"]) == (8, "this process")
    assert fingerprint(model, optimizer, vars(optimizer)) == before
    assert not optimizer.state
    assert accelerator.sync_gradients
    assert (accelerator.step, accelerator.gradient_state.in_dataloader) == (0, False)


def test_a_step_is_the_loop_s_and_keeps_what_a_loop_keeps() -> None:
    """Two micro-batches of a window, one step of the optimizer, no gradient left, and the last output alive."""
    accelerator, model, optimizer, loader = made(gradient_accumulation_steps=4)
    steps: list[Any] = []
    gradients: list[Any] = []
    optimizer.optimizer.register_step_pre_hook(lambda *_: gradients.append(model[0].weight.grad.clone()))
    optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(accelerator.sync_gradients))
    workload = integration._Loop(accelerator, model, source_of(loader), [optimizer], nn.CrossEntropyLoss(), 32)
    workload.begin()
    workload.train_step(8)
    assert steps == [True]
    assert model[0].weight.grad is None
    (x, _), output, loss = workload._last
    assert (x.shape, output.shape, loss.shape) == ((8, 6), (8, 3), ())
    workload.forget()
    assert workload._last is None
    assert not optimizer.state
    workload.train_step(32)  # as large as the window
    assert (steps, len(gradients)) == ([True, True], 2)


def test_a_step_that_runs_out_can_be_run_again() -> None:
    accelerator, model, optimizer, loader = made()
    failing = {"on": True}

    def loss_fn(output: Any, target: Any) -> Any:
        if failing["on"]:
            assert not accelerator.sync_gradients
            raise torch.OutOfMemoryError("amid the first micro-batch of two")
        return nn.functional.cross_entropy(output, target)

    workload = integration._Loop(accelerator, model, source_of(loader), [optimizer], loss_fn, 32)
    with pytest.raises(torch.OutOfMemoryError):
        workload.train_step(8)
    assert accelerator.sync_gradients
    workload.forget()
    failing["on"] = False
    workload.train_step(8)
    assert model[0].weight.grad is None


def test_a_model_that_returns_its_loss_needs_no_loss_function() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            logits = self.layer(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    accelerator = Accelerator(cpu=True)
    model = Own()
    rows = [{"x": torch.randn(4), "labels": torch.tensor(1)} for _ in range(16)]
    others = accelerator.prepare(model, torch.optim.SGD(model.parameters()), DataLoader(rows, batch_size=2))
    model, optimizer, loader = others
    autobatch.tune(accelerator, model, loader, optimizer=[optimizer], effective_batch_size=16, **QUICK)
    assert (loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps) == (8, 2)


def test_between_epochs_it_may_be_called_again_and_windows_begin_anew() -> None:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator, model, optimizer, loader = made(gradient_accumulation_plugin=plugin)
    loss_fn = nn.CrossEntropyLoss()
    trained(accelerator, model, optimizer, loader)
    assert accelerator.step == 2
    autobatch.tune(accelerator, model, loader, optimizer=optimizer, loss_fn=loss_fn, effective_batch_size=24, **QUICK)
    counts: list[int] = []
    optimizer.optimizer.register_step_post_hook(lambda *_: counts.append(accelerator.step))
    trained(accelerator, model, optimizer, loader)
    assert counts == [3, 6]


def refused(error: type[AutobatchError], said: str, accelerator: Accelerator, *objects: Any, **options: Any) -> None:
    """Asserts that tune() refuses, with these words, and that nothing was touched."""
    model, optimizer, loader = objects

    def everything() -> tuple[Any, ...]:
        state = accelerator.gradient_state
        sizes = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return fingerprint(model, optimizer), sizes, state.num_steps, accelerator.step, state.sync_gradients

    before = everything()
    with pytest.raises(error) as caught:
        autobatch.tune(accelerator, model, loader, optimizer=optimizer, **options)
    assert said in str(caught.value)
    assert everything() == before


def test_what_is_not_prepared_is_refused() -> None:
    accelerator, model, optimizer, loader = made()
    plain = nn.Linear(6, 3)
    wanted = "must be as accelerator.prepare() returned it: prepare it first"
    refused(InvalidArgumentError, f"model='Linear': {wanted}", accelerator, plain, optimizer, loader)
    refused(InvalidArgumentError, f"model=None: {wanted}", accelerator, None, optimizer, loader)
    sgd = torch.optim.SGD(plain.parameters())
    refused(InvalidArgumentError, f"optimizer='SGD': {wanted}", accelerator, model, sgd, loader)
    refused(InvalidArgumentError, f"optimizer=None: {wanted}", accelerator, model, None, loader)
    unprepared = DataLoader(loader.dataset, batch_size=4)
    said = "data='DataLoader': must be a loader as accelerator.prepare() returned it"
    refused(InvalidArgumentError, said, accelerator, model, optimizer, unprepared)


def test_other_arguments_that_are_wrong_are_refused() -> None:
    accelerator, *objects = made()
    refused(InvalidArgumentError, "loss_fn='mse': must be", accelerator, *objects, loss_fn="mse")
    refused(InvalidArgumentError, "effective_batch_size=-1", accelerator, *objects, effective_batch_size=-1)


def test_an_accelerator_amid_an_epoch_or_a_window_is_refused() -> None:
    accelerator, *objects = made()
    drawing = iter(objects[2])
    next(drawing)
    refused(UnsupportedTrainerError, "a loader of the accelerator is being iterated over", accelerator, *objects)
    assert len(list(drawing)) == 1
    accelerator.gradient_accumulation_steps = 3
    accelerator.step = 4
    said = "the accelerator has accumulated 1 of 3 steps; tune() must come where no window is open"
    refused(UnsupportedTrainerError, said, accelerator, *objects)


@pytest.mark.parametrize("way", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"])
def test_a_model_that_a_rank_cannot_step_by_itself_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, *objects = made()
    monkeypatch.setitem(vars(accelerator.state), "distributed_type", DistributedType(way))
    refused(
        UnsupportedTrainerError, f"the accelerator runs the model with {way}; a rank must be", accelerator, *objects
    )


def test_ranks_that_share_out_more_than_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, *objects = made()
    monkeypatch.setattr(type(accelerator), "parallelism_config", property(lambda self: object()), raising=False)
    refused(UnsupportedTrainerError, "the accelerator has a parallelism_config", accelerator, *objects)


def test_a_loader_with_which_one_rank_draws_for_all_is_refused() -> None:
    accelerator, *objects = made(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    said = "the loader is a DataLoaderDispatcher, with which one rank draws for all"
    refused(UnsupportedTrainerError, said, accelerator, *objects)


def test_a_stream_and_a_batch_sampler_of_its_own_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.zeros(6), 0)] * 8)

    class Batches:
        batch_size = None

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1], [2]])

        def __len__(self) -> int:
            return 2

    options = DataLoaderConfiguration(dispatch_batches=False, even_batches=False)
    accelerator, model, optimizer, loader = made(dataloader_config=options)
    stream = accelerator.prepare(DataLoader(Stream(), batch_size=2))
    said = "the loader reads Stream, a stream"
    refused(UnsupportedTrainerError, said, accelerator, model, optimizer, stream)
    batches = accelerator.prepare(DataLoader(loader.dataset, batch_sampler=Batches()))
    said = "the loader has a batch sampler of its own, Batches"
    refused(UnsupportedTrainerError, said, accelerator, model, optimizer, batches)


def test_not_one_sample_fits_and_nothing_is_set() -> None:
    accelerator, model, optimizer, loader = made(norm=nn.LayerNorm)

    def loss_fn(output: Any, target: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(autobatch.DoesNotFitError, match="batch 1 does not fit"):
        autobatch.tune(accelerator, model, loader, optimizer=optimizer, loss_fn=loss_fn, effective_batch_size=8)
    assert (loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps) == (32, 1)


@pytest.mark.slow
def test_the_example_runs() -> None:
    done = run(ROOT / "examples" / "accelerate_loop.py")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, *steps = done.stdout.splitlines()
    assert first.startswith("An optimizer step is 256 = ")
    assert second.startswith("The batch size was set on the loader, ")
    assert len(steps) == 4
