"""tune() of an engine of Ignite: real values on the CPU, in little memory and in plenty."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ignite")

import torch
from ignite.engine import DeterministicEngine, Engine, Events, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autobatch
from autobatch.errors import AutobatchError, InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.ignite import AutoBatch, trials, update
from autobatch.integrations.ignite.trials import Iterations, Windows
from autobatch.integrations.loaders import source_of
from autobatch.probe.state import fingerprint
from tests.integration.under_limit import ROOT, run

SCRIPT = Path(__file__).parent / "ignite_under_limit.py"
QUICK: dict[str, Any] = {"max_batch_size": 8, "start": 8}
"""Two trials and a confirmation, for what does not depend on the answer."""


@pytest.fixture(autouse=True, scope="module")
def _versions() -> Iterator[None]:
    print(f"pytorch-ignite {version('pytorch-ignite')}, torch {torch.__version__}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_without_it_the_stated_batch_runs_out() -> None:
    done = run(SCRIPT, "plain")
    assert done.returncode == 1
    assert "DefaultCPUAllocator: can't allocate memory" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
@pytest.mark.parametrize("how", ["tuned", pytest.param("attached", marks=pytest.mark.slow)])
def test_with_the_one_line_it_trains_to_the_end_with_the_gradients_of_the_whole_batch(how: str) -> None:
    done = run(SCRIPT, how)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["steps"], told["iterations"]) == ([256] * 4, 4)
    assert told["all_seen"]
    assert told["error"] < 1e-5
    (micro,) = told["micro_batches"]
    assert told["set"] == [256, micro]
    assert 4 <= micro < 256


def parts(*, batch_size: int = 32, norm: type[nn.Module] = nn.BatchNorm1d) -> tuple[nn.Module, Any, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), norm(16), nn.Dropout(0.2), nn.Linear(16, 3))
    rows = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    return model, torch.optim.AdamW(model.parameters()), DataLoader(rows, batch_size, shuffle=True)


def supervised(model: nn.Module, optimizer: Any, **options: Any) -> Engine:
    return create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss(), **options)


def accumulated(model: nn.Module, optimizer: Any, micro_batch_size: int = 1, **options: Any) -> Engine:
    loss_fn = nn.CrossEntropyLoss()
    return Engine(
        update(autobatch.Accumulator(model, optimizer, loss_fn, micro_batch_size=micro_batch_size, **options))
    )


@pytest.mark.parametrize(
    ("kind", "options", "effective", "size"),
    [
        (supervised, {}, 8, 8),
        (supervised, {}, 4, 4),
        (supervised, {}, None, 8),
        (supervised, {"gradient_accumulation_steps": 4}, 32, 8),
        (supervised, {"gradient_accumulation_steps": 4}, 16, 4),
        (supervised, {"gradient_accumulation_steps": 4}, None, 8),
        (accumulated, {}, 32, 32),
        (accumulated, {}, None, 8),
    ],
)
def test_it_trains_bit_for_bit_as_with_these_numbers_by_hand(
    kind: Callable[..., Engine], options: dict[str, Any], effective: int | None, size: int
) -> None:
    model, optimizer, loader = parts()
    engine = kind(model, optimizer, **options)
    result = autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=effective, **QUICK)
    assert (loader.batch_size, len(loader)) == (size, -(-64 // size))
    steps = options.get("gradient_accumulation_steps", 1)
    assert result.environment["effective_batch_size"] == (effective or size * steps)
    assert result.notes[-1].endswith(f"The loader's batch size was set to {size}.")
    engine.run(loader, max_epochs=2)
    tuned = fingerprint(model, optimizer)

    model, optimizer, loader = parts(batch_size=size)
    if kind is accumulated:
        options = {"micro_batch_size": 8}
        assert result.environment["accumulation"]["micro_batch_size"] == 8
        assert "The accumulator's micro_batch_size was set to 8." in result.notes[-1]
    kind(model, optimizer, **options).run(loader, max_epochs=2)
    assert fingerprint(model, optimizer) == tuned


def test_an_accumulator_need_not_divide_the_batch() -> None:
    model, optimizer, loader = parts(norm=nn.LayerNorm)
    engine = accumulated(model, optimizer)
    result = autobatch.tune(engine, None, loader, effective_batch_size=29, **QUICK)
    assert "An optimizer step is 29 = 8 samples x 1 step + 7 samples x 3 steps." in result.notes
    assert (loader.batch_size, engine._process_function.accumulator.micro_batch_size) == (29, 8)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", [supervised, accumulated])
def test_what_is_there_before_is_there_afterwards(
    kind: Callable[..., Engine],
    attached: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    model, optimizer, loader = parts()
    engine = kind(model, optimizer)
    seen: list[Any] = []
    for event in Events:
        engine.add_event_handler(event, lambda *_, event=event: seen.append(event))
    engine.run(loader)  # so that there is a state to lose, and gradients of an epoch after
    nn.functional.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()

    def everything() -> tuple[Any, ...]:
        state = {name: repr(value) for name, value in vars(engine.state).items()}
        handlers = {event: [id(each) for each, *_ in known] for event, known in engine._event_handlers.items()}
        others = {name: id(value) for name, value in vars(engine).items()}
        return fingerprint(model, optimizer), state, handlers, others, list(seen)

    before = everything()
    assert before[0] == everything()[0]
    capfd.readouterr()
    caplog.clear()
    if attached:
        engine.state.dataloader = loader
        AutoBatch(model, optimizer, loader, 8, **QUICK)(engine)
    else:
        autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=8, **QUICK)
    assert everything() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [supervised, accumulated])
def test_trials_amid_this_process_leave_everything_as_it_was(kind: Callable[..., Engine]) -> None:
    """As on a GPU, where a trial is no fork: what a process function does to its engine, and a schedule that ends."""
    model, optimizer, loader = parts()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=3)
    engine = kind(model, optimizer, **({"scheduler": schedule} if kind is accumulated else {}))
    own = engine._process_function

    if kind is supervised:

        def process(engine: Engine, batch: Any) -> Any:
            assert (engine.state.batch, engine.state.epoch, engine.state.epoch_length) == (batch, 1, 2)
            assert engine.state.dataloader is loader
            engine.state.own = "left behind"
            engine.state.metrics["own"] = 1.0
            engine.fire_event(Events.ITERATION_STARTED)
            engine.should_terminate = True
            engine.own = "left behind too"
            return own(engine, batch)

        engine._process_function = process
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: pytest.fail("a handler was called"))
    before = fingerprint(model, optimizer, schedule), dict(vars(engine)), dict(vars(engine.state))
    metrics = dict(engine.state.metrics)
    if kind is supervised:
        workload: Any = Iterations(engine, model, optimizer, loader, source_of(loader), 32)
    else:
        workload = Windows(own.accumulator, model, optimizer, source_of(loader), 32)
    found = autobatch.find(workload, device="cpu", isolate=False, **QUICK)
    assert (found.batch_size, found.environment["trials_in"]) == (8, "this process")
    assert (fingerprint(model, optimizer, schedule), dict(vars(engine)), dict(vars(engine.state))) == before
    assert engine.state.metrics == metrics
    assert not optimizer.state
    assert not optimizer._optimizer_step_post_hooks


def test_an_update_that_runs_out_can_be_run_again() -> None:
    """Also amid what a scaler believes to be its step."""
    model, optimizer, loader = parts()
    scaler = torch.amp.GradScaler("cpu")
    failing = {"on": True}

    def process(engine: Engine, batch: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        if failing["on"]:
            raise torch.OutOfMemoryError("amid clipping")
        scaler.step(optimizer)
        scaler.update()

    engine = Engine(process)
    workload = Iterations(engine, model, optimizer, loader, source_of(loader), None)
    assert any(item is scaler for item in workload.stateful)
    before = dict(vars(engine))
    with pytest.raises(torch.OutOfMemoryError):
        workload.train_step(8)
    assert vars(engine) == before
    assert not optimizer._optimizer_step_post_hooks
    failing["on"] = False
    workload.forget()  # as after every trial
    workload.train_step(8)


@pytest.mark.parametrize("given_length", [None, 2])
def test_a_run_that_has_just_started_has_epochs_of_the_new_length(given_length: int | None) -> None:
    model, optimizer, loader = parts()
    engine, lengths = supervised(model, optimizer), list[Any]()
    handler = AutoBatch(model, optimizer, loader, effective_batch_size=8, **QUICK)
    handler.attach(engine)
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: lengths.append((e.state.iteration, e.state.epoch_length))
    )
    engine.run(loader, max_epochs=2, epoch_length=given_length)
    assert lengths == [(8, 8), (16, 8)]
    assert handler.result is not None
    assert handler.result.batch_size == 8
    found = handler.result
    engine.state.max_epochs = None
    engine.run(loader, max_epochs=1)  # keeps the sizes
    assert handler.result is found
    assert lengths[2:] == [(8, 8)]


def test_a_length_of_the_user_s_own_stays() -> None:
    model, optimizer, loader = parts()
    engine = supervised(model, optimizer)
    AutoBatch(model, optimizer, loader, effective_batch_size=8, **QUICK).attach(engine)
    state = engine.run(loader, max_epochs=2, epoch_length=5)
    assert (state.epoch_length, state.iteration) == (5, 10)


@pytest.mark.skipif("max_iters" not in inspect.signature(Engine.run).parameters, reason="since Ignite 0.5.5")
def test_iterations_may_be_what_limits_a_run() -> None:
    model, optimizer, loader = parts()
    engine = supervised(model, optimizer)
    AutoBatch(model, optimizer, loader, effective_batch_size=8, **QUICK).attach(engine)
    state = engine.run(loader, max_iters=11)
    assert (state.iteration, state.epoch_length) == (11, 8)


def test_a_deterministic_engine_draws_the_same_as_by_hand() -> None:
    bits = []
    for tuned in (True, False):
        model, optimizer, loader = parts(batch_size=32 if tuned else 8)
        engine = DeterministicEngine(supervised(model, optimizer)._process_function)
        if tuned:
            autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=8, **QUICK)
        engine.run(loader, max_epochs=2)
        bits.append(fingerprint(model, optimizer))
    assert bits[0] == bits[1]


def test_an_accumulator_that_has_run_keeps_its_count() -> None:
    model, optimizer, loader = parts()
    engine = accumulated(model, optimizer, 4)
    engine.run(loader)
    autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=16, **QUICK)
    accumulator = engine._process_function.accumulator
    assert (accumulator.windows, accumulator.micro_batch_size, loader.batch_size) == (2, 8, 16)


def refused(error: type[AutobatchError], said: str, engine: Engine, *objects: Any, **options: Any) -> None:
    """Asserts that tune() refuses, with these words, and that nothing was touched."""
    model, optimizer, loader = objects

    def everything() -> tuple[Any, ...]:
        sizes = getattr(loader, "batch_size", None), getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return fingerprint(model, optimizer), sizes, dict(vars(engine)), dict(vars(engine.state))

    before = everything()
    with pytest.raises(error) as caught:
        autobatch.tune(engine, model, loader, optimizer=optimizer, **{**QUICK, **options})
    assert said in str(caught.value)
    assert everything() == before


def test_what_cannot_accumulate_and_does_not_fit_at_once_is_refused() -> None:
    model, optimizer, loader = parts()
    said = "effective_batch_size=32 takes 32 samples at once, and 8 is the most that fits"
    objects = model, optimizer, loader
    refused(UnsupportedTrainerError, said, supervised(model, optimizer), *objects, effective_batch_size=32)
    engine = supervised(model, optimizer, gradient_accumulation_steps=3)
    said = "effective_batch_size=16: must be a multiple of 3, the iterations of all ranks after which"
    refused(UnsupportedTrainerError, said, engine, *objects, effective_batch_size=16)


def test_an_engine_amid_a_run_is_refused() -> None:
    model, optimizer, loader = parts()
    engine = supervised(model, optimizer)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    def amid() -> None:
        said = "the engine is amid a run, at iteration 1; tune() must come before it"
        refused(UnsupportedTrainerError, said, engine, model, optimizer, loader)

    engine.run(loader)
    assert engine.state.iteration == 2
    engine.load_state_dict({"epoch": 1, "max_epochs": 3, "epoch_length": 2})
    refused(UnsupportedTrainerError, "at iteration 2; tune() must come before it", engine, model, optimizer, loader)


def test_a_run_over_another_loader_is_refused() -> None:
    model, optimizer, loader = parts()
    engine = supervised(model, optimizer)
    engine.logger.setLevel(logging.CRITICAL)
    AutoBatch(model, optimizer, loader, **QUICK).attach(engine)
    with pytest.raises(UnsupportedTrainerError, match="the engine runs over another list than the one that is tuned"):
        engine.run([(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))])


def test_wrong_arguments_are_refused() -> None:
    model, optimizer, loader = parts()
    engine, other = supervised(model, optimizer), nn.Linear(6, 3)
    refused(InvalidArgumentError, "optimizer=None: must be the torch optimizer", engine, model, None, loader)
    refused(InvalidArgumentError, "optimizer='Linear': must be the torch", engine, model, other, loader)
    refused(InvalidArgumentError, "model=None: must be the module that", engine, None, optimizer, loader)
    said = "must be left out: the process function knows it"
    refused(InvalidArgumentError, said, engine, model, optimizer, loader, loss_fn=nn.MSELoss())
    ours = accumulated(model, optimizer)
    refused(InvalidArgumentError, "model='Linear': must be that of the accumulator", ours, other, optimizer, loader)
    sgd = torch.optim.SGD(other.parameters())
    refused(InvalidArgumentError, "optimizer='SGD': must be those of the accumulator", ours, model, sgd, loader)
    with pytest.raises(InvalidArgumentError, match=r"accumulator='Linear': must be an autobatch.Accumulator"):
        update(other)
    with pytest.raises(InvalidArgumentError, match=r"must be left out: of autobatch.find"):
        AutoBatch(model, optimizer, loader, device="cpu")


def test_an_optimizer_that_is_never_stepped_is_refused() -> None:
    model, optimizer, loader = parts()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    said = "the process function did not step the optimizer that was given within 64 iterations"
    refused(UnsupportedTrainerError, said, supervised(model, optimizer), model, other, loader)


@pytest.mark.parametrize("wrapped", [True, False])
def test_models_that_a_rank_cannot_step_by_itself_are_refused(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, loader = parts()
    if wrapped:
        model, said = nn.DataParallel(model), "the model is in DataParallel, over several devices of one process"
    else:
        monkeypatch.setattr(trials, "DistributedDataParallel", nn.Sequential)
        model.static_graph = True
        said = "the model is in DistributedDataParallel(static_graph=True)"
    refused(UnsupportedTrainerError, said, supervised(model, optimizer), model, optimizer, loader)


def test_a_stream_and_a_batch_sampler_of_its_own_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.zeros(6), 0)] * 8)

    model, optimizer, loader = parts()
    engine = supervised(model, optimizer)
    stream = DataLoader(Stream(), batch_size=2)
    refused(UnsupportedTrainerError, "the loader reads Stream, a stream", engine, model, optimizer, stream)
    own = DataLoader(loader.dataset, batch_sampler=[[0, 1], [2]])
    refused(UnsupportedTrainerError, "the loader has a batch sampler of its own", engine, model, optimizer, own)
    refused(InvalidArgumentError, "data=None: must be the loader", engine, model, optimizer, None)


@pytest.mark.slow
def test_the_example_runs() -> None:
    done = run(ROOT / "examples" / "ignite_engine.py")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, *steps = done.stdout.splitlines()
    assert first.startswith("An optimizer step is 256 = ")
    assert second.startswith("The accumulator's micro_batch_size was set to ")
    assert len(steps) == 4
