"""tune() of a transformers Trainer and of those that derive from it: real values on the CPU."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import autobatch
from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations import sizes
from autobatch.integrations import transformers as integration
from autobatch.probe import finder, inquiry
from autobatch.probe.state import fingerprint
from tests.integration import texts
from tests.integration.under_limit import ROOT, run

SCRIPT = Path(__file__).parent / "tune_transformers.py"
QUICK: dict[str, Any] = {"max_batch_size": 4, "start": 4}
NUMBERS = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")


@pytest.fixture(autouse=True, scope="module")
def _versions() -> Iterator[None]:
    names = ("transformers", "trl", "sentence-transformers", "accelerate", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _state_of_no_other_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on how sure the answer is."""
    monkeypatch.setattr(inquiry, "CONFIRM_STEPS", 2)
    monkeypatch.setattr(finder, "SHUFFLES", 1)


@pytest.fixture
def trials_here(monkeypatch: pytest.MonkeyPatch, few_trials: None) -> None:
    """As on a GPU: a fork cannot change what is looked at."""
    monkeypatch.setattr(sizes, "find", functools.partial(finder.find, isolate=False))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_without_it_the_stated_batch_runs_out(tmp_path: Path) -> None:
    done = run(SCRIPT, "plain", str(tmp_path))
    assert done.returncode == 1
    assert "DefaultCPUAllocator: can't allocate memory" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_with_the_one_line_it_trains_to_the_end_with_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    done = run(SCRIPT, "tuned", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == [256] * 4
    assert told["optimizer_steps"] == told["global_step"] == 4
    assert told["all_seen"]
    assert told["error"] < 1e-5
    (micro,) = told["micro_batches"]
    size, steps, eval_size = told["set"]
    assert (size, steps) == (micro, 256 // micro)
    assert 4 <= micro < 256
    assert 4 <= eval_size < 512


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_the_example_says_what_it_trained_with(tmp_path: Path) -> None:
    done = run(ROOT / "examples" / "hf_trainer.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    equation, steps = done.stdout.splitlines()[-2:]
    size, accumulated = map(int, re.findall(r"256 = (\d+) samples? x (\d+) steps?", equation)[0])
    assert size * accumulated == 256
    assert steps == "trained 4 steps of 256 samples"


class Model(nn.Module):
    """Of everything that a step may change: weights, buffers, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.randn(6, generator=torch.Generator().manual_seed(index)), "labels": index % 3}


def plain(
    folder: Path,
    *,
    cls: type[transformers.Trainer] = transformers.Trainer,
    own_optimizer: bool = False,
    model: Any = None,
    model_init: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    **options: Any,
) -> transformers.Trainer:
    torch.manual_seed(0)
    if model is None and model_init is None:
        model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if own_optimizer else None
    return cls(
        model,
        transformers.TrainingArguments(**texts.arguments(folder, **options)),
        train_dataset=train_dataset or Rows(),
        eval_dataset=eval_dataset or Rows(),
        compute_metrics=compute_metrics,
        model_init=model_init,
        optimizers=(optimizer, None),
    )


def recomputed(folder: Path, **options: Any) -> transformers.Trainer:
    """A model of the library that recomputes its activations, in bfloat16, with noise on its embeddings."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    rows = [{"input_ids": torch.arange(8) % 7, "labels": torch.arange(8) % 7}] * 64
    options |= {"bf16": True, "gradient_checkpointing": True, "neftune_noise_alpha": 1.0}
    return plain(folder, model=transformers.GPT2LMHeadModel(config), train_dataset=rows, eval_dataset=rows, **options)


KINDS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "own optimizer": functools.partial(plain, own_optimizer=True),
    "model_init": functools.partial(plain, model_init=Model),
    "recomputed": recomputed,
    "trl": texts.sft,
    "sentence-transformers": functools.partial(texts.sentences, batch_sampler="no_duplicates"),
}
_LIBRARIES = ("transformers", "accelerate", "trl", "sentence_transformers", "torch.optim")


def picture(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Everything that hangs from ``value``, as far as it is the libraries' own or a module."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str)):
        return re.sub(r"0x[0-9a-f]+", "", value) if isinstance(value, str) else value
    if isinstance(value, Tensor):
        return fingerprint(value)
    if id(value) in seen:
        return f"again {seen[id(value)]}"
    seen[id(value)] = len(seen)
    kind = type(value)
    if isinstance(value, dict):
        return [kind.__name__, [(picture(key, seen), picture(item, seen)) for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return [kind.__name__, [picture(item, seen) for item in value]]
    if isinstance(value, nn.Module) or any(cls.__module__.startswith(_LIBRARIES) for cls in kind.__mro__):
        return [kind.__name__, picture(vars(value), seen)] if hasattr(value, "__dict__") else repr(value)
    return getattr(value, "__qualname__", kind.__qualname__)


@pytest.mark.usefixtures("trials_here")
@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_numbers_is_as_it_was_and_the_run_that_of_numbers_set_by_hand(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make = functools.partial(KINDS[kind], tmp_path)
    trainer = make()
    optimizer, files = trainer.optimizer, sorted(tmp_path.rglob("*"))
    before, values = picture(trainer), fingerprint(trainer.model, trainer.optimizer)
    capfd.readouterr()
    caplog.clear()
    result = autobatch.tune(trainer, effective_batch_size=12, **QUICK)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert fingerprint(trainer.model, trainer.optimizer) == values
    assert trainer.optimizer is optimizer
    assert sorted(tmp_path.rglob("*")) == files
    assert trainer.state.global_step == 0
    numbers = {name: getattr(trainer.args, name) for name in NUMBERS}
    assert numbers == dict(zip(NUMBERS, (4, 3, 4), strict=True))
    assert result.environment["accumulation"]["steps"] == 3
    by_hand = make(**numbers)
    assert picture(trainer) == picture(by_hand)
    assert picture(trainer) != before
    with torch.random.fork_rng():
        by_hand.train()
    trainer.train()
    assert fingerprint(*trainer.model.state_dict().values()) == fingerprint(*by_hand.model.state_dict().values())


@pytest.mark.usefixtures("few_trials")
def test_trials_in_forks_leave_as_little(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer at work, whose threads are not there in a fork."""
    trainer = texts.sentences(tmp_path)
    trainer.get_train_dataloader().collate_fn([trainer.train_dataset[0], trainer.train_dataset[1]])
    trainer = texts.sentences(tmp_path)
    values = fingerprint(trainer.model)
    capfd.readouterr()
    result = autobatch.tune(trainer, effective_batch_size=12, **QUICK)
    assert capfd.readouterr() == ("", "")
    assert result.environment["trials_in"] == "forks of this process"
    assert fingerprint(trainer.model) == values
    assert result.notes[-2:] == (
        "Set in the trainer's arguments: per_device_train_batch_size=4, gradient_accumulation_steps=3, "
        "per_device_eval_batch_size=4.",
        "MultipleNegativesRankingLoss compares the samples of a micro-batch with each other: 3 of 4 are not the same "
        "to it as one of 12.",
    )


def test_one_that_was_evaluated_before(tmp_path: Path, trials_here: None) -> None:
    """Which has prepared its model, to stay so."""
    trainer = plain(tmp_path, bf16=True)
    trainer.evaluate()
    trainer.accelerator.sync_gradients = False
    before, numbers = picture(trainer), {name: getattr(trainer.args, name) for name in NUMBERS}
    autobatch.tune(trainer, effective_batch_size=12, **QUICK)
    for name, number in numbers.items():
        setattr(trainer.args, name, number)
    trainer._train_batch_size = trainer.args.train_batch_size
    assert picture(trainer) == before
    trainer.train()


def test_an_error_of_the_step_is_raised_and_leaves_as_little(tmp_path: Path, trials_here: None) -> None:
    class Failing(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            super().training_step(*args, **kwargs)
            raise KeyError("column 7")

    trainer = plain(tmp_path, cls=Failing)
    before, values = picture(trainer), fingerprint(trainer.model)
    with pytest.raises(KeyError, match="column 7"):
        autobatch.tune(trainer, effective_batch_size=12, **QUICK)
    assert picture(trainer) == before
    assert fingerprint(trainer.model) == values


class Watching(transformers.Trainer):
    """Notes what its own methods are called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[Any] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        window, items = super().get_batch_samples(*args, **kwargs)
        watched.append(("window", [tuple(batch["labels"].shape) for batch in window]))
        return window, items

    def training_step(self, model: Any, inputs: Any, items: Any = None) -> Tensor:
        watched.append(("step", tuple(inputs["labels"].shape), self.accelerator.sync_gradients))
        return super().training_step(model, inputs, items)

    def prediction_step(self, model: Any, inputs: Any, only_loss: bool, ignore_keys: Any = None) -> Any:
        watched.append(("evaluation", tuple(inputs["labels"].shape), only_loss))
        return super().prediction_step(model, inputs, only_loss, ignore_keys)


watched: list[Any] = []


def test_a_window_is_there_as_a_whole_and_the_longest_are_tried(tmp_path: Path, trials_here: None) -> None:
    watched.clear()
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=64)
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in range(2, 42)]

    def padded(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(sample["labels"]) for sample in samples)
        return {
            name: torch.tensor([sample[name] + [0] * (longest - len(sample[name])) for sample in samples])
            for name in samples[0]
        }

    trainer = plain(
        tmp_path, cls=Watching, model=transformers.GPT2LMHeadModel(config), train_dataset=rows, eval_dataset=rows[:9]
    )
    trainer.data_collator = padded
    autobatch.tune(trainer, effective_batch_size=20, **QUICK)
    first, second = [call for call in watched if call[0] == "window"][:2]
    assert first == ("window", [(4, 36)] * 5)  # a little shorter, then the longest
    assert second == ("window", [(4, 41)] * 5)
    assert [call for call in watched if call[0] == "step"][2:4] == [("step", (4, 41), False), ("step", (4, 41), True)]
    assert {call[1] for call in watched if call[0] == "evaluation"} == {(4, 10)}


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how large what is joined is."""

    joined: list[int]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cat:
            self.joined.append(len(found))
        return found


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"compute_metrics": lambda predictions: {}}, 40), ({}, 0), ({"eval_do_concat_batches": False}, 0)],
)
def test_outputs_for_metrics_are_joined_as_the_loop_does(
    tmp_path: Path, trials_here: None, options: dict[str, Any], rows: int
) -> None:
    watched.clear()
    trainer = plain(tmp_path, cls=Watching, eval_dataset=[Rows()[number] for number in range(40)], **options)
    mode = Sizes()
    mode.joined = []
    with mode:
        autobatch.tune(trainer, effective_batch_size=4, **QUICK)
    assert max(mode.joined, default=0) == rows
    only_loss = "compute_metrics" not in options
    assert {call for call in watched if call[0] == "evaluation"} == {("evaluation", (4,), only_loss)}


def test_several_evaluations_are_all_tried(tmp_path: Path, trials_here: None) -> None:
    watched.clear()
    rows = [Rows()[number] for number in range(40)]
    trainer = plain(tmp_path, cls=Watching, eval_dataset={"few": rows[:3], "many": rows})
    autobatch.tune(trainer, effective_batch_size=4, **QUICK)
    assert {call[1] for call in watched if call[0] == "evaluation"} == {(3,), (4,)}
    assert trainer.args.per_device_eval_batch_size == 4


def test_without_evaluation_and_accumulation(tmp_path: Path, few_trials: None) -> None:
    trainer = plain(tmp_path, auto_find_batch_size=True)
    trainer.eval_dataset = None
    result = autobatch.tune(trainer, **QUICK)
    numbers = [getattr(trainer.args, name) for name in NUMBERS]
    assert numbers == [4, 1, 8]
    assert trainer.args.auto_find_batch_size is False
    assert result.notes[-1] == (
        "Set in the trainer's arguments: per_device_train_batch_size=4, gradient_accumulation_steps=1, and "
        "auto_find_batch_size=False, which would start again with fewer samples a step."
    )
    trainer.train()
    assert trainer.state.train_batch_size == 4


def test_the_loss_is_divided_by_the_steps_once(tmp_path: Path, few_trials: None) -> None:
    """Some releases of transformers have Accelerate do it as well."""
    trainer = plain(tmp_path)
    trainer.accelerator.gradient_accumulation_steps = 3
    autobatch.tune(trainer, effective_batch_size=12, **QUICK)
    assert trainer.accelerator.gradient_accumulation_steps == 1


@pytest.mark.slow
def test_a_cache_tells_windows_and_optimizers_apart(tmp_path: Path, few_trials: None) -> None:
    # A limit that is given: what is free differs where others use the machine, and more room is asked about anew.
    options = QUICK | {"cache": tmp_path / "answers", "memory_limit": "2GiB"}
    first = autobatch.tune(plain(tmp_path), effective_batch_size=12, **options)
    again = autobatch.tune(plain(tmp_path), effective_batch_size=12, **options)
    assert (len(first.confirmation), len(again.confirmation)) == (4, 0)
    assert first.batch_size == again.batch_size
    for changes, effective in (({}, 24), ({"optim": "sgd"}, 12), ({"bf16": True}, 12)):
        other = autobatch.tune(plain(tmp_path, **changes), effective_batch_size=effective, **options)
        assert len(other.confirmation) == 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Rows()[number] for number in range(64))


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return Rows()[index]


class Fixed(transformers.Trainer):
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=7))


def changed(where: str, value: Any) -> Callable[[Path], Any]:
    """A plain trainer of which one thing is otherwise than it can be made here."""

    def make(folder: Path) -> Any:
        trainer = plain(folder)
        *path, name = where.split(".")
        setattr(functools.reduce(getattr, path, trainer), name, value)
        return trainer

    return make


def deepspeed(folder: Path) -> Any:
    trainer = plain(folder)
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(
        **{
            name: getattr(trainer.accelerator, name)
            for name in ("distributed_type", "split_batches", "parallelism_config")
        },
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)),
    )
    return trainer


def with_args(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: plain(folder, **options)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "running": (changed("is_in_train", True), "the trainer is running, or its train() ended with an error"),
    "trained": (changed("state.global_step", 3), "the trainer has run 3 steps; it must be one that was not started"),
    "no data": (changed("train_dataset", None), "the trainer has no train_dataset"),
    "several data sets": (changed("train_dataset", {"a": Rows()}), "train_dataset is a dict, and each batch comes"),
    "stream": (with_args(train_dataset=Stream()), "the training loader reads Stream, a stream"),
    "no length": (changed("train_dataset", Endless()), "the training loader reads Endless, which has no length"),
    "evaluation of a stream": (with_args(eval_dataset=Stream()), "the evaluation loader reads Stream, a stream"),
    "its own batches": (with_args(cls=Fixed), "it draws 7 samples at once where the arguments say 3"),
    "batches of equal cost": (
        lambda folder: recomputed(folder, train_sampling_strategy="batch_rebalance"),
        "the training loader has a batch sampler of its own, BatchRebalanceSampler",
    ),
    "batches by label": (
        lambda folder: texts.sentences(folder, batch_sampler="group_by_label"),
        "the training loader cannot be made for 3 samples a batch, as for any: batch_size must be an even number",
    ),
    "DeepSpeed": (deepspeed, "to DeepSpeed (ZeRO stage 3), and one rank that runs out of memory"),
    "FSDP": (changed("is_fsdp_enabled", True), "shards its model with FSDP"),
    "parallelism": (changed("accelerator.state.parallelism_config", object()), "the model is shared out over ranks"),
    "DataParallel": (changed("args._n_gpu", 2), "one process trains on 2 GPUs (DataParallel); start one for each"),
    "device_map": (changed("is_model_parallel", True), "the model is spread over several devices"),
    "split_batches": (
        with_args(accelerator_config={"split_batches": True}),
        "accelerator_config.split_batches=True shares one batch out over the ranks; it must be False",
    ),
    "Liger": (changed("args.use_liger_kernel", True), "use_liger_kernel=True changes transformers for good"),
    "layerwise": (changed("args.optim", "galore_adamw_layerwise"), "optim='galore_adamw_layerwise' steps amid"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_tuned_is_refused_untouched(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = BAD[case]
    trainer = make(tmp_path)
    before, values = picture(trainer), fingerprint(trainer.model)
    monkeypatch.setattr(integration, "searched", None)  # it does not come to that
    with pytest.raises(UnsupportedTrainerError, match=re.escape(said)):
        autobatch.tune(trainer, effective_batch_size=12)
    assert picture(trainer) == before
    assert fingerprint(trainer.model) == values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": Model()}, "model='Model': must be left out: the trainer has its own"),
        ({"data": Rows()}, "data='Rows': must be left out"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer='SGD': must be left out"),
        ({"loss_fn": nn.MSELoss()}, "loss_fn='MSELoss': must be left out"),
        ({"effective_batch_size": 0}, "effective_batch_size=0: must be"),
        ({"isolate": True}, "isolate=True: must be left out"),
        ({"headroom": 2}, "headroom=2: must be a fraction"),
    ],
)
def test_wrong_arguments_leave_everything_as_it_was(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    trainer = plain(tmp_path)
    before, values = picture(trainer), fingerprint(trainer.model)
    with pytest.raises(InvalidArgumentError, match=re.escape(said)):
        autobatch.tune(trainer, **arguments)
    assert picture(trainer) == before
    assert fingerprint(trainer.model) == values
