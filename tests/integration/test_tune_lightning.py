"""tune() and the callback AutoBatch with real Lightning trainers, on the CPU with real values and limits of memory."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

lightning = pytest.importorskip("lightning")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

with contextlib.suppress(ImportError):
    import pytorch_lightning  # noqa: F401  # both names are in use here

import autobatch  # noqa: E402
from autobatch.errors import DoesNotFitError, InvalidArgumentError, UnsupportedTrainerError  # noqa: E402
from autobatch.integrations.lightning import AutoBatch  # noqa: E402
from autobatch.probe.state import fingerprint  # noqa: E402
from tests.integration.tune_lightning import (  # noqa: E402
    Module,
    Rows,
    loader_of,
    settle,
    trainer_of,
    weights_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("tune_lightning.py")
FEW: dict[str, Any] = {"memory_limit": "200MiB", "max_batch_size": 8, "start": 8}
"""A search of one trial: what comes of it is looked at here, not the search. The limit is far off, also in a process in
which other tests have left a heap full of holes.
"""


@pytest.fixture(scope="module", autouse=True)
def _settled() -> Iterator[None]:
    for name in ("lightning", "pytorch-lightning", "torch"):
        print(name, importlib.metadata.version(name))
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings():
        settle()
        yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.fixture(autouse=True)
def _collected() -> None:
    """What a test before this one has left would count as held."""
    gc.collect()


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """What Lightning logs for a person."""
    found: list[Any] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    known = [(logger := logging.getLogger(name), logger.level) for name in ("lightning", "lightning.pytorch")]
    for logger, _ in known:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    yield found
    for logger, level in known:
        logger.setLevel(level)
        logger.removeHandler(handler)


def run(*words: str, cwd: Path, within_s: float = 100) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Evaluated(Module):
    """Evaluation needs four times the memory of training."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.sizes.append((dataloader_idx, len(batch[0])))
        hidden = self.net.first(batch[0])
        kept = [hidden * factor for factor in range(self.net.layers * 5)]
        self.log("error", mse_loss(self.net.last(kept[-1]), batch[1]))


class Making(Evaluated):
    """Makes its loaders anew, with its attribute ``batch_size`` if it has one."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader_of(128, getattr(self, "batch_size", 4))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        size = getattr(self, "eval_batch_size", getattr(self, "batch_size", 4))
        return [loader_of(128, size), loader_of(64, size)]


class Data(lightning.LightningDataModule):
    def __init__(self, batch_size: int = 4, eval_batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.set_up = 0

    def setup(self, stage: str) -> None:
        self.set_up += 1
        self.rows = Rows(128)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.hparams.eval_batch_size)


class Watching(lightning.pytorch.Callback):
    """A callback of the user's, which must hear nothing of trials."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") or name == "setup":
            self.heard.append(name)
        return super().__getattribute__(name)


def test_what_ran_out_of_memory_trains_to_the_end_with_the_batch_asked_for(tmp_path: Path) -> None:
    run(str(SCRIPT), str(tmp_path), "train_under_a_limit", cwd=tmp_path)
    found = json.loads((tmp_path / "said-0.json").read_text())["train_under_a_limit"]
    assert "DefaultCPUAllocator: can't allocate memory" in found["without"]
    assert 32 <= found["fits"] < 220
    micro, steps = found["plan"]["micro_batch_size"], found["plan"]["steps"]
    assert micro * steps == 256
    assert micro <= found["fits"]
    assert found["tuned"]["global_step"] == 1024 // 256
    assert found["tuned"]["steps"] == [steps * step for step in (1, 2, 3, 4)]
    assert found["tuned"] == found["by hand"]


@pytest.mark.parametrize(
    ("options", "error"),
    [(FEW, None), ({"memory_limit": "4MiB"}, DoesNotFitError), (FEW | {"steps": 7}, KeyError)],
    ids=["found", "nothing fits", "an error of the module"],
)
def test_all_else_is_as_it_was(
    tmp_path: Path, monkeypatch: Any, lines: list[Any], options: dict[str, Any], error: Any
) -> None:
    class Failing(Evaluated):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if error is KeyError:
                raise KeyError("column 7")
            return super().training_step(batch, index)

    monkeypatch.chdir(tmp_path)
    order = torch.Generator().manual_seed(3)
    module, training, evaluation = Failing(), loader_of(shuffle=True, generator=order), loader_of()
    watching = Watching()
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path / "logs")
    profiler = lightning.pytorch.profilers.SimpleProfiler(tmp_path, "times")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=logger, callbacks=[watching], profiler=profiler
    )
    watching.heard.clear()
    lines.clear()

    def state() -> Any:
        known = [trainer.callbacks, trainer.loggers, trainer.profiler, trainer.optimizers, trainer.datamodule]
        strategy = {name: repr(value) for name, value in vars(trainer.strategy).items()}
        loops = json.dumps(trainer.fit_loop.state_dict(), default=str)
        return (
            fingerprint(module, order),
            (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            (list(vars(module)), module._trainer, [repr(each) for each in known], list(vars(trainer))),
            (strategy, loops, repr(trainer.state), trainer.global_step, dict(profiler.recorded_durations)),
            (trainer.fit_loop._data_source.instance, trainer.max_epochs, trainer.fit_loop._combined_loader),
            sorted(vars(training)),
            sorted(tmp_path.rglob("*")),
        )

    before = state()
    if error is None:
        result = autobatch.tune(trainer, module, (training, evaluation), effective_batch_size=32, **options)
        assert (training.batch_size, evaluation.batch_size, trainer.accumulate_grad_batches) == (8, 8, 4)
        assert result.eval_batch_size == 8
        assert (
            "Set: accumulate_grad_batches=4 of the trainer (was 1); batch_size=8 of the training loader (was 4); "
            "batch_size=8 of the evaluation loader (was 4)."
        ) in result.notes
    else:
        with pytest.raises(error):
            autobatch.tune(trainer, module, (training, evaluation), effective_batch_size=32, **options)
        assert (training.batch_size, evaluation.batch_size, trainer.accumulate_grad_batches) == (4, 4, 1)
    assert state() == before
    assert watching.heard == []
    assert lines == []


class Scheduled(Evaluated):
    """Its schedule must know how many steps there will be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        self.estimated = steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize(("how", "kind"), [("tune", Scheduled), ("callback", Evaluated)])
def test_training_is_as_if_the_numbers_had_been_set_by_hand(how: str, kind: Any) -> None:
    found = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        module, evaluation = kind(), loader_of()
        training = loader_of(64, 8 if by_hand else 4, shuffle=True)
        options: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
        if not by_hand and how == "callback":
            options |= {"accumulate_grad_batches": 1, "callbacks": [AutoBatch(16, **FEW)]}
        trainer = trainer_of(**options)
        if not by_hand and how == "tune":
            trainer.accumulate_grad_batches = 1
            autobatch.tune(trainer, module, (training, evaluation), effective_batch_size=16, **FEW)
        if by_hand:
            evaluation = loader_of(64, 8)
        torch.manual_seed(1)
        trainer.fit(module, training, evaluation)
        found.append((weights_of(module), trainer.global_step, module.steps, module.sizes))
    assert found[0] == found[1]
    assert found[0][1] == 2 * 64 // 16


def test_a_schedule_is_made_for_the_steps_that_there_will_be() -> None:
    module, training = Scheduled(), loader_of(64, 4)
    trainer = trainer_of(callbacks=[AutoBatch(16, **FEW)])
    trainer.fit(module, training)
    assert (module.estimated, trainer.global_step) == (4, 4)
    assert len(trainer.optimizers) == 1
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


class Plain(Module):
    def __init__(self) -> None:
        super().__init__(8)
        self.double()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return mse_loss(self.net(batch[0].double()), batch[1].double())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


@pytest.mark.parametrize(
    ("count", "clip", "drop_last"),
    [(24, None, False), (20, None, False), (20, 0.05, False), (22, 0.05, False), (18, None, False), (22, None, True)],
)
def test_a_short_last_window_has_the_gradient_of_its_samples(count: int, clip: float | None, drop_last: bool) -> None:
    """Of 8 samples in micro-batches of 4; Lightning alone is wrong by the share that the window lacks."""
    ours, reference, alone = (Plain() for _ in range(3))
    reference.load_state_dict(ours.state_dict())
    alone.load_state_dict(ours.state_dict())
    callback = AutoBatch(8, memory_limit="60MiB", max_batch_size=4, start=4)
    options = {"max_epochs": 2, "gradient_clip_val": clip}
    trainer_of(callbacks=[callback], **options).fit(ours, loader_of(count, 2, drop_last=drop_last))
    trainer_of(accumulate_grad_batches=2, **options).fit(alone, loader_of(count, 4, drop_last=drop_last))
    rows, optimizer = Rows(count), torch.optim.SGD(reference.parameters(), lr=0.3)
    used = count - count % 4 if drop_last else count
    for _ in range(2):
        for start in range(0, used, 8):
            batch = [
                torch.stack(part) for part in zip(*(rows[i] for i in range(start, min(start + 8, used))), strict=True)
            ]
            optimizer.zero_grad()
            reference.training_step(batch, 0).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            optimizer.step()
    whole = torch.cat([parameter.detach().flatten() for parameter in reference.parameters()])
    for module, is_exact in ((ours, True), (alone, used % 8 == 0)):
        found = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        assert ((found - whole).abs().max() < 1e-12) == is_exact


def test_evaluation_has_a_size_of_its_own_for_all_its_loaders() -> None:
    module, training, evaluation = Evaluated(), loader_of(128), [loader_of(128), loader_of(16)]
    callback = AutoBatch(64, memory_limit="100MiB", multiple_of="pow2", start=8)
    trainer_of(callbacks=[callback]).fit(module, training, evaluation)
    result = callback.result
    assert result is not None
    assert result.eval_batch_size is not None
    assert 4 <= result.eval_batch_size < result.batch_size
    assert [loader.batch_size for loader in evaluation] == [result.eval_batch_size] * 2
    assert {size for number, size in module.sizes if number == 0} == {result.eval_batch_size}
    assert {size for number, size in module.sizes if number == 1} == {min(16, result.eval_batch_size)}
    assert {trial.mode for trial in result.trials if not trial.fits} == {"eval"}


def test_evaluation_that_is_switched_off_is_left_alone() -> None:
    evaluation = loader_of()
    result = autobatch.tune(trainer_of(limit_val_batches=0), Evaluated(), (loader_of(), evaluation), **FEW)
    assert (result.eval_batch_size, evaluation.batch_size) == (None, 4)


def test_a_data_module_is_given_numbers_by_its_hyperparameters() -> None:
    module, data, trainer = Evaluated(), Data(), trainer_of()
    result = autobatch.tune(trainer, module, data, effective_batch_size=16, **FEW)
    assert (data.hparams.batch_size, data.hparams.eval_batch_size) == (8, 8), result
    assert (data.set_up, hasattr(data, "rows"), data.trainer) == (0, False, None)
    assert (
        "Set: accumulate_grad_batches=2 of the trainer (was 1); batch_size=8 of the hparams of Data (was 4); "
        "eval_batch_size=8 of the hparams of Data (was 2)."
    ) in result.notes
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 128 // 16
    assert trainer.train_dataloader.batch_size == 8


def test_loaders_that_a_hook_makes_are_rebatched_by_the_callback() -> None:
    module, callback = Making(), AutoBatch(16, **FEW)
    trainer = trainer_of(callbacks=[callback])
    trainer.fit(module)
    assert (trainer.train_dataloader.batch_size, trainer.global_step) == (8, 128 // 16)
    assert {size for _, size in module.sizes} == {8}


def test_loaders_that_are_made_anew_each_epoch_follow_an_attribute() -> None:
    module = Making()
    module.batch_size = module.eval_batch_size = 4
    trainer = trainer_of(callbacks=[AutoBatch(16, **FEW)], reload_dataloaders_every_n_epochs=1, max_epochs=2)
    trainer.fit(module)
    assert (module.batch_size, module.eval_batch_size) == (8, 8)
    assert (trainer.train_dataloader.batch_size, trainer.global_step) == (8, 2 * 128 // 16)


def test_training_and_evaluation_that_share_an_attribute_take_what_fits_both() -> None:
    module, trainer = Making(), trainer_of()
    module.batch_size = 4
    result = autobatch.tune(trainer, module, effective_batch_size=64, memory_limit="70MiB", multiple_of="pow2", start=8)
    assert result.eval_batch_size is not None
    assert module.batch_size == result.eval_batch_size < result.batch_size
    assert trainer.accumulate_grad_batches * module.batch_size == 64
    assert result.environment["accumulation"]["micro_batch_size"] == module.batch_size
    assert [note for note in result.notes if note.startswith("An optimizer step is ")] == [
        f"An optimizer step is 64 = {module.batch_size} samples x {64 // module.batch_size} steps."
    ]
    trainer.fit(module)
    assert trainer.global_step == 128 // 64


@pytest.mark.parametrize("how", ["tune", "reload"])
def test_loaders_made_anew_by_a_hook_without_an_attribute_are_refused(how: str) -> None:
    module = Making()
    if how == "tune":
        trainer = trainer_of()
        before = fingerprint(module)
        with pytest.raises(UnsupportedTrainerError, match=r"Making.train_dataloader\(\) makes a loader anew") as caught:
            autobatch.tune(trainer, module, **FEW)
        assert fingerprint(module) == before
    else:
        trainer = trainer_of(callbacks=[AutoBatch(**FEW)], reload_dataloaders_every_n_epochs=1)
        with pytest.raises(UnsupportedTrainerError, match="makes a loader anew") as caught:
            trainer.fit(module)
    assert "attribute batch_size" in str(caught.value)
    assert trainer.accumulate_grad_batches == 1


def test_evaluation_loaders_that_cannot_be_changed_must_fit() -> None:
    class Stubborn(Making):
        def val_dataloader(self) -> Any:
            return loader_of(128, self.stubborn)

    module, trainer = Stubborn(), trainer_of()
    module.batch_size, module.stubborn = 4, 2
    result = autobatch.tune(trainer, module, effective_batch_size=16, **FEW)
    assert module.batch_size == 8
    assert "eval" not in result.notes[-1]
    module.stubborn = 16
    with pytest.raises(UnsupportedTrainerError, match="loaders of 16 samples a batch, of which 8 fit"):
        autobatch.tune(trainer, module, effective_batch_size=16, **FEW)


@pytest.mark.slow
def test_a_margin_is_kept() -> None:
    found = []
    for headroom in (0.0, 0.5):
        loader = loader_of(256)
        result = autobatch.tune(
            trainer_of(), Module(), loader, memory_limit="150MiB", headroom=headroom, multiple_of=16, start=32
        )
        assert loader.batch_size == result.batch_size
        found.append(result.batch_size)
    assert 16 <= found[1] <= 0.7 * found[0]


def test_a_cap_is_kept_and_was_tried() -> None:
    loader = loader_of()
    result = autobatch.tune(trainer_of(), Module(), loader, max_batch_size=12, start=12, memory_limit="120MiB")
    assert (result.batch_size, result.proof, loader.batch_size) == (12, "max_batch_size", 12)
    assert 12 in {trial.batch_size for trial in result.trials if trial.fits}


def test_a_data_set_smaller_than_the_batch_is_one_batch() -> None:
    loader, trainer, module = loader_of(7), trainer_of(), Module()
    result = autobatch.tune(trainer, module, loader, memory_limit="120MiB", start=7)
    assert (result.batch_size, result.proof, loader.batch_size, trainer.accumulate_grad_batches) == (7, "dataset", 7, 1)
    trainer.fit(module, loader)
    assert trainer.global_step == 1


def test_a_sampler_that_draws_less_than_the_data_set_has_is_the_limit() -> None:
    rows = Rows(64)
    loader = DataLoader(rows, 4, sampler=torch.utils.data.SubsetRandomSampler(range(6)))
    result = autobatch.tune(trainer_of(), Module(), loader, **FEW)
    assert (result.batch_size, loader.batch_size) == (8, 6)
    assert "A rank draws 6 samples in an epoch." in result.notes
    assert result.environment["effective_batch_size"] == 6


class Huge(Module):
    """64 MiB a sample, while it is told so."""

    elements = 16 << 20

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) + torch.zeros(len(batch[0]), self.elements).sum()


def test_nothing_fits() -> None:
    module, loader, trainer = Huge(), loader_of(), trainer_of()
    with pytest.raises(DoesNotFitError, match="batch 1 does not fit on host memory"):
        autobatch.tune(trainer, module, loader, memory_limit="60MiB")
    assert (loader.batch_size, trainer.accumulate_grad_batches) == (4, 1)
    module.elements = 1
    trainer.fit(module, loader)
    assert trainer.global_step == 16


class Adversarial(Module):
    """Steps by itself, one part after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(mse_loss(self.net(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in (self.net.first, self.net.last)]


def test_a_module_that_steps_by_itself() -> None:
    module, loader, trainer = Adversarial(), loader_of(), trainer_of()
    result = autobatch.tune(trainer, module, loader, **FEW)
    assert (result.batch_size, loader.batch_size) == (8, 8)
    trainer.fit(module, loader)
    assert trainer.global_step == 2 * 8  # both optimizers
    with pytest.raises(UnsupportedTrainerError, match="automatic_optimization=False: the module steps by itself"):
        autobatch.tune(trainer_of(), module, loader, effective_batch_size=16, **FEW)


def test_hooks_of_the_module_prepare_its_steps_and_are_called_for_training_as_ever() -> None:
    class Preparing(Evaluated):
        def on_fit_start(self) -> None:
            self.called = ["fit"]

        def on_train_start(self) -> None:
            self.called.append("train")
            self.total = self.trainer.num_training_batches * len(self.trainer.train_dataloader)

        def on_train_epoch_start(self) -> None:
            self.called.append("epoch")
            self.losses: list[Tensor] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            assert self.trainer.training
            assert self.lr_schedulers() is None
            loss = super().training_step(batch, index) / self.total
            self.losses.append(loss.detach())
            return loss

        def on_validation_epoch_start(self) -> None:
            self.outputs: list[int] = []

        def validation_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
            assert self.trainer.validating
            assert not torch.is_grad_enabled()
            self.outputs.append(index)

    module, loader = Preparing(), loader_of()
    callback = AutoBatch(16, **FEW)
    trainer_of(callbacks=[callback], num_sanity_val_steps=0).fit(module, loader, loader_of())
    assert callback.result is not None
    assert module.called == ["fit", "train", "epoch"]
    assert len(module.losses) == len(module.outputs) == 8


def test_a_fit_that_goes_on_takes_the_numbers_of_its_checkpoint(tmp_path: Path) -> None:
    trials: list[Any] = []
    asked: dict[str, Any] = {**FEW, "on_trial": trials.append}
    trainer = trainer_of(callbacks=[AutoBatch(16, **asked)])
    trainer.fit(Module(), loader_of())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    seen = len(trials)
    assert seen
    for effective, is_asked_for in ((16, True), (32, False)):
        callback, loader = AutoBatch(effective, **asked), loader_of()
        other = trainer_of(callbacks=[callback], max_epochs=2)
        other.fit(Module(), loader, ckpt_path=tmp_path / "kept.ckpt")
        assert (len(trials) == seen) == is_asked_for
        assert (loader.batch_size, other.accumulate_grad_batches) == (8, effective // 8)
        assert callback.result is not None


@pytest.mark.parametrize("how", ["tune", "callback"])
def test_the_package_under_its_other_name(how: str) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Module().net

        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    module, loader = Other(), loader_of()
    callbacks = [AutoBatch(16, **FEW)] if how == "callback" else []
    trainer = trainer_of(other, callbacks=callbacks)
    if how == "tune":
        autobatch.tune(trainer, module, loader, effective_batch_size=16, **FEW)
        with pytest.raises(InvalidArgumentError, match=r"must be a pytorch_lightning\.LightningModule"):
            autobatch.tune(trainer, Module(), loader)
    trainer.fit(module, loader)
    assert (loader.batch_size, trainer.global_step) == (8, 64 // 16)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


class Fetching(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError


def scheduled_accumulation() -> Any:
    return lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 2})


@pytest.mark.parametrize(
    ("trainer", "module", "data", "options", "error", "said"),
    [
        ({}, Module, DataLoader(Stream(), 4), {}, UnsupportedTrainerError, "reads Stream, a stream"),
        ({}, Module, DataLoader(Rows(), None), {}, UnsupportedTrainerError, "batch_size=None"),
        ({}, Module, (loader_of(), DataLoader(Stream(), 4)), {}, UnsupportedTrainerError, "an evaluation loader reads"),
        ({}, Module, [loader_of()] * 3, {}, InvalidArgumentError, "data='list of 3': must be a DataLoader, a pair"),
        ({}, Module, ([loader_of()], None), {}, UnsupportedTrainerError, "the training loader is a list"),
        ({}, Module, {"a": loader_of()}, {}, UnsupportedTrainerError, "the training loader is a dict"),
        ({}, Module, None, {}, UnsupportedTrainerError, "there is no training loader"),
        ({}, torch.nn.Linear, loader_of(), {}, InvalidArgumentError, "model='Linear': must be a lightning.pytorch.L"),
        ({}, Fetching, loader_of(), {}, UnsupportedTrainerError, "training_step(dataloader_iter)"),
        ({}, Module, loader_of(), {"optimizer": 1}, InvalidArgumentError, "optimizer='int': must be left out"),
        ({}, Module, loader_of(), {"effective_batch_size": 0}, InvalidArgumentError, "effective_batch_size=0"),
        ({}, Module, loader_of(), {"device": "cpu"}, InvalidArgumentError, "device='cpu': must be left out"),
        ({"fast_dev_run": True}, Module, loader_of(), {}, UnsupportedTrainerError, "fast_dev_run=True runs a few"),
        ({"overfit_batches": 2}, Module, loader_of(), {}, UnsupportedTrainerError, "overfit_batches=2 trains"),
        ({"limit_train_batches": 0}, Module, loader_of(), {}, UnsupportedTrainerError, "limit_train_batches=0"),
        (
            {"callbacks": [scheduled_accumulation()]},
            Module,
            loader_of(),
            {},
            UnsupportedTrainerError,
            "the callback GradientAccumulationScheduler sets",
        ),
        (
            {"devices": 2, "strategy": "ddp"},
            Module,
            loader_of(),
            {"effective_batch_size": 1},
            UnsupportedTrainerError,
            "effective_batch_size=1: must be a multiple of 2, the ranks",
        ),
        (
            {"devices": 2, "strategy": "ddp", "sync_batchnorm": True},
            Module,
            loader_of(),
            {},
            UnsupportedTrainerError,
            "SyncBatchNorm runs collectives amid a step, and one rank that runs out",
        ),
        (
            {"devices": 2, "strategy": "ddp_spawn"},
            Module,
            loader_of(),
            {},
            UnsupportedTrainerError,
            "it must be tuned by the callback AutoBatch",
        ),
    ],
)
def test_what_cannot_be_tuned_is_said_before_anything_is_touched(
    trainer: Any, module: Any, data: Any, options: dict[str, Any], error: Any, said: str
) -> None:
    live = trainer_of(**trainer)
    model = module(3, 3) if module is torch.nn.Linear else module()
    before = fingerprint(model), list(vars(model)), repr(live.state), live.accumulate_grad_batches
    with pytest.raises(error) as caught:
        autobatch.tune(live, model, data, **options)
    assert said in str(caught.value)
    assert (fingerprint(model), list(vars(model)), repr(live.state), live.accumulate_grad_batches) == before


def test_strategies_that_shard_are_told_another_way() -> None:
    live = trainer_of()
    live._accelerator_connector.strategy = type("FSDPStrategy", (), {"launcher": None})()  # the real one wants a GPU
    with pytest.raises(UnsupportedTrainerError, match=r"FSDPStrategy shards the model.*autobatch probe -- COMMAND"):
        autobatch.tune(live, Module(), loader_of())


def test_a_trainer_that_is_running_is_refused() -> None:
    said = []

    class Asking(Module):
        def on_train_start(self) -> None:
            with pytest.raises(UnsupportedTrainerError) as caught:
                autobatch.tune(self.trainer, self, loader_of())
            said.append(str(caught.value))

    trainer_of(limit_train_batches=1).fit(Asking(), loader_of())
    assert said == ["the trainer is running fit(); it must be tuned before, or by the callback AutoBatch"]


def test_the_callback_checks_its_arguments_at_once_and_its_trainer_in_fit() -> None:
    with pytest.raises(InvalidArgumentError, match="effective_batch_size=-1"):
        AutoBatch(-1)
    with pytest.raises(InvalidArgumentError, match="isolate=True: must be left out"):
        AutoBatch(isolate=True)
    with pytest.raises(UnsupportedTrainerError, match="fast_dev_run"):
        trainer_of(fast_dev_run=True, callbacks=[AutoBatch(16)]).fit(Module(), loader_of())


def test_batches_that_are_counted_are_named() -> None:
    result = autobatch.tune(trainer_of(limit_train_batches=3), Module(), loader_of(), **FEW)
    assert result.notes[-1] == "limit_train_batches=3 counts micro-batches, whose size has changed."


def test_a_short_window_is_told_after_tune() -> None:
    result = autobatch.tune(trainer_of(), Module(), loader_of(20), effective_batch_size=16, **FEW)
    assert "The last window of an epoch has 1 of 2 micro-batches" in result.notes[-1]
    assert "Lightning#19987" in result.notes[-1]


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    said = run(str(ROOT / "examples" / "lightning_trainer.py"), cwd=tmp_path)
    assert "An optimizer step is 256 = " in said
