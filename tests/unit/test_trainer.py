"""Trainer: what it trains, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from autobatch import CheckpointError, InvalidArgumentError, Trainer
from autobatch.errors import AutobatchWarning
from autobatch.probe.state import fingerprint
from autobatch.training.checkpoint import newest
from autobatch.training.events import Event
from autobatch.training.feed import Feed
from tests.workloads.training import OUT


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Samples with an augmentation that draws from every generator."""

    def __init__(self, samples: int = 23) -> None:
        chance = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(samples, 6, generator=chance), torch.randn(samples, 2, generator=chance)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(6) + random.random() + float(numpy.random.rand())
        return self.x[index] + 0.01 * noise, self.y[index]


class Stop(Exception):
    """Raised by a callback."""


def made(hidden: int = 8, **options: Any) -> tuple[Trainer, list[Any]]:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    model = nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.3), nn.Linear(hidden, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    defaults: dict[str, Any] = {"effective_batch_size": 7, "micro_batch_size": 3, "progress": False}
    trainer = Trainer(model, optimizer, nn.MSELoss(), scheduler=scheduler, **{**defaults, **options})
    return trainer, [model, optimizer, scheduler]


def stopped_after(windows: int) -> Any:
    def callback(event: Event) -> None:
        if event.kind == "window" and event.windows == windows:
            raise Stop

    return callback


def bits(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    """A hash of all that a run has to go on with exactly: whatever object holds it."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    state = optimizer.state_dict()
    for tensor in [
        *model.state_dict().values(),
        *(value for entry in state["state"].values() for value in entry.values()),
    ]:
        digest.update(tensor.numpy().tobytes())
    digest.update(repr([state["param_groups"], scheduler.state_dict(), random.random(), numpy.random.rand()]).encode())
    return digest.hexdigest()


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Batch norm is warned of in each."""


def test_it_trains_every_sample_once_an_epoch_at_the_effective_batch() -> None:
    events: list[Event] = []
    trainer, (model, *_) = made(callbacks=[events.append], max_grad_norm=1.0)
    before = fingerprint(model)
    report = trainer.fit(Rows(), epochs=3)
    assert (report.epochs, report.windows, str(report.plan)) == (
        3,
        12,
        "7 = 3 samples x 1 step + 2 samples x 2 steps",
    )
    assert [event.window.samples for event in events if event.window] == [7, 7, 7, 2] * 3
    assert report.losses[2] < report.losses[0]
    assert fingerprint(model) != before
    assert [event.kind for event in events if event.kind != "window"] == ["started", *["epoch"] * 3, "ended"]


def test_a_last_window_may_be_left_out() -> None:
    events: list[Event] = []
    made(callbacks=[events.append], drop_last=True)[0].fit(Rows())
    assert [event.window.samples for event in events if event.window] == [7, 7, 7]
    with pytest.raises(
        InvalidArgumentError, match="effective_batch_size=24: must be at most 23, the samples there are"
    ):
        made(effective_batch_size=24, drop_last=True)[0].fit(Rows())


class Plain(Rows):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def test_a_window_is_the_full_batchs_step() -> None:
    """Without batch norm and dropout the weights are those of plain full-batch training on the same samples."""
    rows = Plain()  # what an augmentation draws goes by the micro-batch
    torch.manual_seed(2)
    model, twin = nn.Linear(6, 2).double(), nn.Linear(6, 2).double()
    twin.load_state_dict(model.state_dict())
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin))
    collate = lambda part: tuple(tensor.double() for tensor in torch.utils.data.default_collate(part))  # noqa: E731
    Trainer(
        model, ours, nn.MSELoss(), effective_batch_size=7, micro_batch_size=2, collate_fn=collate, progress=False
    ).fit(rows, epochs=2)
    feed = Feed(
        rows,
        effective_batch_size=7,
        micro_batch_sizes=[7],
        rank=0,
        collate_fn=collate,
        shuffle=True,
        drop_last=False,
        seed=0,
        workers=0,
    )
    for epoch in range(2):
        for (batch,) in feed.epoch(epoch):
            theirs.zero_grad()
            nn.functional.mse_loss(twin(batch[0]), batch[1]).backward()
            theirs.step()
    assert (model.weight - twin.weight).abs().max() < 1e-12


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("windows", [1, 4, 6])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, workers: int, windows: int) -> None:
    whole, state = made()
    expected = whole.fit(Rows(), epochs=2)
    reference = bits(*state)
    folder = tmp_path / "run"
    first, _ = made(checkpoint=folder, checkpoint_every=1, callbacks=[stopped_after(windows)])
    with pytest.raises(Stop):
        first.fit(Rows(), epochs=2)
    torch.rand(100)  # whatever was drawn since
    second, its_state = made(checkpoint=folder, checkpoint_every=1, workers=workers)
    torch.manual_seed(99)
    report = second.fit(Rows(), epochs=2)
    assert bits(*its_state) == reference
    assert report.losses == expected.losses
    again, its_state = made(checkpoint=folder, noise=False)
    assert again.fit(Rows(), epochs=2).windows == 8  # there is nothing left to train
    assert fingerprint(*its_state[:1]) == fingerprint(*state[:1])


def test_sigterm_writes_a_checkpoint_and_exits(tmp_path: Path) -> None:
    whole, state = made()
    whole.fit(Rows(), epochs=2)
    reference = bits(*state)
    events: list[Event] = []

    def callback(event: Event) -> None:
        events.append(event)
        if event.windows == 3 and event.kind == "window":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    first, _ = made(checkpoint=tmp_path, callbacks=[callback])
    with pytest.raises(SystemExit) as ended:
        first.fit(Rows(), epochs=2)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [event.kind for event in events[-3:]] == ["window", "checkpoint", "stopped"]
    assert newest(tmp_path)[0].name == "window-00000003"
    second, its_state = made(checkpoint=tmp_path)
    second.fit(Rows(), epochs=2)
    assert bits(*its_state) == reference


def test_checkpoints_are_read_by_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer, (model, optimizer, _) = made(checkpoint=tmp_path, keep=1)
    trainer.fit(Rows(), epochs=1)
    (path,) = newest(tmp_path)
    assert path.name == "window-00000004"
    weights = load_file(path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    rest = torch.load(path / "training.pt", weights_only=True)
    assert rest["optimizers"][0]["state"][0]["step"] == optimizer.state_dict()["state"][0]["step"]
    assert sorted(os.listdir(tmp_path)) == [".lock", path.name]


def damaged(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def changed(path: Path) -> None:
    with (path / "training.pt").open("r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2\3")


def other_format(path: Path) -> None:
    about = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**about, "format": 99}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damaged, "model.safetensors: not what was written"),
        (changed, "training.pt: not what was written"),
        (other_format, "of format 99"),
        (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_loaded(tmp_path: Path, harm: Any, said: str) -> None:
    made(checkpoint=tmp_path)[0].fit(Rows(), epochs=1)
    harm(newest(tmp_path)[0])
    trainer, state = made(checkpoint=tmp_path)
    before = fingerprint(*state)
    with pytest.raises(CheckpointError, match=said):
        trainer.fit(Rows(), epochs=2)
    assert fingerprint(*state) == before


def test_a_checkpoint_of_another_model_optimizer_or_kind_of_run_is_refused(tmp_path: Path) -> None:
    made(checkpoint=tmp_path)[0].fit(Rows(), epochs=1)
    trainer, state = made(hidden=9, checkpoint=tmp_path)
    before = fingerprint(*state)
    with pytest.raises(CheckpointError, match=r"of another model: 0.bias is float32\[8\], and float32\[9\] here"):
        trainer.fit(Rows(), epochs=2)
    assert fingerprint(*state) == before
    model = made()[1][0]
    some = torch.optim.AdamW([model[0].weight])
    with pytest.raises(
        CheckpointError, match=r"of other optimizers: parameters by group are \[\[6\]\], and \[\[1\]\] here"
    ):
        Trainer(model, some, nn.MSELoss(), micro_batch_size=3, checkpoint=tmp_path, progress=False).fit(Rows())
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"of a run with .*scheduler"):
        Trainer(model, plain, nn.MSELoss(), micro_batch_size=3, checkpoint=tmp_path, progress=False).fit(Rows())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"effective_batch_size": 5}, "effective_batch_size was 7, and is 5"),
        ({"seed": 3}, "seed was 0, and is 3"),
        ({"shuffle": False}, "shuffle was 1, and is 0"),
    ],
)
def test_another_order_is_refused_amid_an_epoch_and_taken_after_one(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    first, _ = made(checkpoint=tmp_path, checkpoint_every=1, callbacks=[stopped_after(3)])
    with pytest.raises(Stop):
        first.fit(Rows(), epochs=2)
    trainer, state = made(checkpoint=tmp_path, **change)
    before = fingerprint(*state)
    with pytest.raises(CheckpointError, match=f"amid an epoch, after window 2, .*: {said}"):
        trainer.fit(Rows(), epochs=2)
    assert fingerprint(*state) == before
    made(checkpoint=tmp_path)[0].fit(Rows(), epochs=1)
    assert made(checkpoint=tmp_path, **change)[0].fit(Rows(), epochs=2).epochs == 2


def test_another_version_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(checkpoint=tmp_path)[0].fit(Rows(), epochs=1)
    monkeypatch.setattr("autobatch.training.checkpoint.__version__", "99")
    with pytest.warns(AutobatchWarning, match="the run may go on with other bits"):
        made(checkpoint=tmp_path)[0].fit(Rows(), epochs=2)


def test_what_could_not_be_read_again_is_refused_before_training(tmp_path: Path) -> None:
    trainer, (_, optimizer, _) = made(checkpoint=tmp_path)
    optimizer.param_groups[0]["owner"] = Stop()
    with pytest.raises(CheckpointError, match="would not be read again"):
        trainer.fit(Rows())
    assert newest(tmp_path) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def callback(event: Event) -> None:
        if event.kind == "window" and event.windows == 1:
            made(checkpoint=tmp_path)[0].fit(Rows())

    with pytest.raises(InvalidArgumentError, match="a folder that no other run writes into"):
        made(checkpoint=tmp_path, callbacks=[callback])[0].fit(Rows())
    made(checkpoint=tmp_path)[0].fit(Rows())


def test_tied_weights_and_what_a_module_keeps_besides(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.two(self.one(x))
            return out[:, :2]

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": self.calls}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    def trained(epochs: int) -> Tied:
        torch.manual_seed(0)
        model = Tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        Trainer(model, optimizer, nn.MSELoss(), micro_batch_size=5, checkpoint=tmp_path / "run", progress=False).fit(
            Rows(), epochs=epochs
        )
        return model

    calls = trained(1).calls
    model = trained(2)
    assert model.calls == 2 * calls
    assert model.one.weight is model.two.weight


def test_evaluation_is_the_mean_over_the_data_set_and_changes_nothing() -> None:
    rows = Plain()
    trainer, (model, optimizer, scheduler) = made(eval_batch_size=4)
    before = fingerprint(model, optimizer, scheduler)
    found = trainer.evaluate(rows, batch_size=5)
    model.eval()
    assert found.loss == pytest.approx(float(nn.functional.mse_loss(model(rows.x), rows.y)), rel=1e-6)
    model.train()
    assert (found.samples, found.terms) == (23, 23)
    assert fingerprint(model, optimizer, scheduler) == before
    assert all(module.training for module in model.modules())
    report = trainer.fit(rows, epochs=2, eval_dataset=rows)
    assert len(report.evaluations) == 2
    assert report.evaluations[0].batch_size == 4


def test_a_window_and_an_evaluation_that_run_out_go_on_smaller() -> None:
    class Small(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise OUT
            return super().forward(x)

    events: list[Event] = []
    model = Small(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        effective_batch_size=8,
        micro_batch_size=8,
        callbacks=[events.append],
        progress=False,
    )
    report = trainer.fit(Plain(), epochs=1, eval_dataset=Plain())
    assert report.micro_batch_size == 2
    assert [event.recovery.next_micro_batch_size for event in events if event.recovery] == [4, 2]
    assert report.evaluations[0].batch_size == 2
    assert report.evaluations[0].samples == 23


def test_the_scalars_of_a_run() -> None:
    from autobatch.training.progress import ScalarLog

    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            self.seen.append((name, step))

    writer = Writer()
    made(callbacks=[ScalarLog(writer, every=2)])[0].fit(Rows(), eval_dataset=Rows())
    assert [entry for entry in writer.seen if entry[0] == "train/loss"] == [("train/loss", 2), ("train/loss", 4)]
    assert ("eval/loss", 4) in writer.seen
    with pytest.raises(InvalidArgumentError, match="writer="):
        ScalarLog(3)


def test_lines_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    made(progress=True)[0].fit(Rows(), epochs=2, eval_dataset=Rows())
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "an optimizer step is 7 = 3 samples x 1 step + 2 samples x 2 steps"
    assert lines[1].startswith("epoch 1/2: loss ")
    assert "micro-batch 3, effective 7" in lines[1]
    assert lines[2].startswith("evaluation: loss ")


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size"),
        ({"effective_batch_size": 2.5}, "effective_batch_size"),
        ({"micro_batch_size": "most"}, "micro_batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"checkpoint": 3}, "checkpoint"),
        ({"checkpoint_every": 3}, "checkpoint_every"),
        ({"seed": -1}, "seed"),
        ({"workers": -1}, "workers"),
        ({"keep": 0}, "keep"),
        ({"callbacks": [3]}, "callbacks"),
        ({"collate_fn": 3}, "collate_fn"),
        ({"reduction": "none"}, "reduction"),
        ({"noise": 3}, "noise"),
        ({"find_options": 3}, "find_options"),
        ({"find_options": {"device": "cpu"}}, "find_options"),
        ({"find_options": {"bogus": 1}}, "find_options"),
        ({"extra_state": [1]}, "extra_state"),
        ({"extra_state": {"ema": 3}}, r"extra_state\['ema'\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{argument}"):
        made(**change)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [(Stream(), "dataset='Stream'"), ({1: 2}, "dataset='dict'"), ([], "of no samples"), (3, "dataset='int'")],
)
def test_a_data_set_without_samples_by_number_is_refused(dataset: Any, said: str) -> None:
    trainer, state = made()
    before = fingerprint(*state)
    with pytest.raises(InvalidArgumentError, match=said):
        trainer.fit(dataset)
    with pytest.raises(InvalidArgumentError, match="epochs=0"):
        trainer.fit(Rows(), epochs=0)
    assert fingerprint(*state) == before


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer, state = made(checkpoint=tmp_path / "file" / "run")
    before = fingerprint(*state)
    with pytest.raises(InvalidArgumentError, match="checkpoint="):
        trainer.fit(Rows())
    assert fingerprint(*state) == before


def test_a_folder_with_checkpoints_is_refused_where_none_is_to_be_gone_on_from(tmp_path: Path) -> None:
    made(checkpoint=tmp_path)[0].fit(Rows())
    with pytest.raises(InvalidArgumentError, match="a folder without checkpoints, or resume=True"):
        made(checkpoint=tmp_path)[0].fit(Rows(), resume=False)


class Remembers(nn.Module):
    """What a state_dict leaves out: a buffer that is not persistent, and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.chance = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        noise = torch.randn(x.shape, generator=self.chance)
        out: Tensor = self.linear(x + 0.01 * noise * self.seen)
        return out


class Head(nn.Module):
    """A loss with weights of its own, which the optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.linear(output), target)


def test_everything_that_decides_the_bits_goes_on(tmp_path: Path) -> None:
    def trained(folder: Path | None, stop_at: int) -> list[Tensor]:
        torch.manual_seed(0)
        model, head, average = Remembers(), Head(), nn.Linear(6, 4)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.05)

        def callback(event: Event) -> None:
            if event.kind == "window":
                with torch.no_grad():
                    for own, other in zip(average.parameters(), model.parameters(), strict=True):
                        own.lerp_(other, 0.1)
            stopped_after(stop_at)(event)

        options: dict[str, Any] = {"effective_batch_size": 7, "micro_batch_size": 3, "extra_state": {"ema": average}}
        trainer = Trainer(model, optimizer, head, callbacks=[callback], progress=False, checkpoint=folder, **options)
        trainer._every = None if folder is None else 1
        trainer.fit(Rows(), epochs=2)
        return [*model.state_dict().values(), model.seen, *head.state_dict().values(), *average.state_dict().values()]

    expected = trained(None, 99)
    with pytest.raises(Stop):
        trained(tmp_path, 4)
    assert all(torch.equal(one, other) for one, other in zip(trained(tmp_path, 99), expected, strict=True))


@pytest.mark.parametrize(
    ("other", "said"),
    [(torch.optim.Adam, "of a run with AdamW, where this has Adam$"), (torch.optim.SGD, "where this has SGD$")],
)
def test_another_kind_of_optimizer_is_refused(tmp_path: Path, other: Any, said: str) -> None:
    def run(kind: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        trainer = Trainer(
            model,
            kind(model.parameters(), lr=0.1),
            nn.MSELoss(),
            micro_batch_size=5,
            checkpoint=tmp_path,
            progress=False,
        )
        trainer.fit(Rows(), epochs=1)
        return model

    run(torch.optim.AdamW)
    with pytest.raises(CheckpointError, match=said):
        run(other)


def test_what_an_evaluation_draws_does_not_change_how_training_goes_on() -> None:
    hashes = []
    for eval_dataset in (None, Rows()):
        trainer, state = made()
        trainer.fit(Rows(), epochs=2, eval_dataset=eval_dataset)
        hashes.append(bits(*state))
    assert hashes[0] == hashes[1]


def test_a_model_in_eval_mode_is_trained_in_training_mode() -> None:
    trainer, (model, *_) = made()
    model.eval()
    trainer.fit(Rows(), eval_dataset=Rows())
    assert all(module.training for module in model.modules())


class Ends(Plain):
    """Asks the run to end, or fails, while it is evaluated."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.end = end

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 5:
            self.end()
        return super().__getitem__(index)


def fail() -> None:
    raise Stop


@pytest.mark.parametrize(("end", "error"), [(fail, Stop), (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit)])
def test_an_epoch_is_kept_whatever_becomes_of_its_evaluation(tmp_path: Path, end: Any, error: Any) -> None:
    whole, state = made()
    expected = whole.fit(Rows(), epochs=2, eval_dataset=Plain())
    reference = bits(*state)
    first, _ = made(checkpoint=tmp_path)
    with pytest.raises(error):
        first.fit(Rows(), epochs=2, eval_dataset=Ends(end))
    assert newest(tmp_path)[0].name == "window-00000004"
    second, its_state = made(checkpoint=tmp_path)
    report = second.fit(Rows(), epochs=2, eval_dataset=Plain())
    assert bits(*its_state) == reference
    assert (report.losses, report.evaluations) == (expected.losses, expected.evaluations)


def test_a_full_disk_is_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    import resource

    trainer, _ = made(hidden=4096, checkpoint=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(CheckpointError, match="window-00000000: cannot be written"):
            trainer.fit(Rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_kill_amid_a_second_checkpoint_of_a_window_leaves_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an evaluation and after it the window is the same."""
    whole, state = made()
    whole.fit(Rows(), epochs=2, eval_dataset=Plain())
    reference = bits(*state)
    renamed: list[Path] = []
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 4:  # of the start, before the evaluation, the one of the start away, after the evaluation
            raise Stop
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        first, _ = made(checkpoint=tmp_path, keep=1)
        with pytest.raises(Stop):
            first.fit(Rows(), epochs=2, eval_dataset=Plain())
    assert [path.name for path in newest(tmp_path)] == ["window-00000004"]
    second, its_state = made(checkpoint=tmp_path, keep=1)
    second.fit(Rows(), epochs=2, eval_dataset=Plain())
    assert bits(*its_state) == reference
    assert [path.name for path in newest(tmp_path)] == ["window-00000008.1"]


def test_a_size_that_is_asked_for_anew_is_taken(tmp_path: Path) -> None:
    made(checkpoint=tmp_path)[0].fit(Rows(), epochs=1)
    report = made(checkpoint=tmp_path, micro_batch_size=6, eval_batch_size=9)[0].fit(
        Rows(), epochs=2, eval_dataset=Plain()
    )
    assert (report.micro_batch_size, report.evaluations[-1].batch_size) == (6, 9)


def test_what_a_model_counts_is_as_before_after_an_evaluation() -> None:
    torch.manual_seed(0)
    model = Remembers()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), Head(), micro_batch_size=5, progress=False)
    before = fingerprint(model), model.chance.get_state().tolist()
    trainer.evaluate(Plain(), batch_size=5)
    assert (fingerprint(model), model.chance.get_state().tolist()) == before


def test_a_run_leaves_no_hook_on_the_model() -> None:
    trainer, (model, *_) = made()
    trainer.fit(Rows())
    assert all(not parameter._backward_hooks for parameter in model.parameters())
