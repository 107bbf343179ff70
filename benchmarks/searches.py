"""The peers: autobatch, and what else finds a batch size, each around the same :class:`~autobatch.Workload`.

What does not choose its start by itself is given one that is above every answer of the cells, which one would have to
know. toma is not a dependency: its published rule, halving after a failure, is a few lines of our own here.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

from autobatch.device.oom import is_oom
from autobatch.probe.forward import forward
from benchmarks.measure import STEPS, STEPS_AFTER, Found, Peer, Task

START = 2048
"""A power of two above every answer in the cells (1901) and on the host."""
START_OF_LANGUAGE_MODELS = 256
"""Likewise for the models of transformers (185)."""
LANGUAGE_MODELS = ("gpt2", "bert", "llama")
_ENDLESS = 10**9


def _autobatch(live: bool, **settings: Any) -> Callable[[Task], Found]:
    def search(task: Task) -> Found:
        import autobatch

        source = task.workload if live else task.build
        result = autobatch.find(source, device=task.place.device, memory_limit=task.place.limit_bytes, **settings)
        ran = (*result.trials, *result.confirmation)
        measured = [trial.measurement.alloc_retries for trial in ran if trial.measurement is not None]
        counts = {
            "trials": result.trial_count,
            "failures": result.oom_count,
            "samples": result.samples_processed,
            "samples_confirming": sum(trial.batch_size * trial.steps for trial in result.confirmation),
            "seconds_confirming": round(sum(trial.duration_s for trial in result.confirmation), 2),
            "asked": [f"{trial.batch_size}{'' if trial.fits else 'x'}" for trial in ran],
        }
        if not live:
            counts["retries"] = sum(known) if (known := [n for n in measured if n is not None]) else None
        return Found(answer=result.batch_size, go_on=lambda: task.train(result.batch_size, STEPS_AFTER), counts=counts)

    return search


def _start(task: Task) -> int:
    return START_OF_LANGUAGE_MODELS if task.build.__name__ in LANGUAGE_MODELS else START


def _accelerate(start: int | None) -> Callable[[Task], Found]:
    """One model outside of the decorated function, as in the example of its docstring."""

    def search(task: Task) -> Found:
        from accelerate.utils import find_executable_batch_size

        @find_executable_batch_size(starting_batch_size=start or _start(task))
        def train(batch_size: int) -> int:
            task.train(batch_size)
            return batch_size

        return _plain(task, train())

    return search


def _toma(task: Task) -> Found:
    """Halves after every failure, and stays at the first size that runs."""
    size = _start(task)
    while not _fits(task, size):
        if size == 1:
            raise MemoryError("one sample does not fit")
        size //= 2
    return _plain(task, size)


def _doubling(task: Task) -> Found:
    """Doubles from one sample to the first failure, then bisects to the last size that runs."""
    low, high = 0, 1
    while _fits(task, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(task, middle) else (low, middle)
    return _plain(task, low)


def _fits(task: Task, size: int) -> bool:
    try:
        task.train(size)
        fits = True
    except Exception as exc:
        if not is_oom(exc):
            raise
        fits = False
    task.clean_up()
    return fits


def _plain(task: Task, answer: int) -> Found:
    return Found(answer=answer, go_on=lambda: task.train(answer, STEPS_AFTER))


def _lightning(mode: str) -> Callable[[Task], Found]:
    """``Tuner.scale_batch_size`` as it is, then ``fit`` of the same trainer."""

    def search(task: Task) -> Found:
        import lightning
        from lightning.pytorch.tuner import Tuner

        _quiet("lightning.pytorch", "lightning.fabric")
        precision = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(task.workload.precision or "", "32-true")
        trainer = lightning.Trainer(
            accelerator="cpu" if task.place.device == "cpu" else "gpu",
            devices=1,
            precision=precision,
            max_steps=STEPS_AFTER,
            default_root_dir=".",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = _lightning_module(task)
        answer = Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=STEPS)
        return Found(answer=answer, go_on=lambda: trainer.fit(module))

    return search


def _lightning_module(task: Task) -> Any:
    import lightning
    import torch

    workload = task.workload

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = workload.model, 1

        def training_step(self, batch: Any, index: int) -> Any:
            _, loss = forward(workload.model, workload.loss_fn, batch, precision=workload.precision, device=self.device)
            return loss

        def configure_optimizers(self) -> Any:
            return workload.optimizer

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                range(_ENDLESS), batch_size=self.batch_size, collate_fn=lambda items: workload.sample(len(items))
            )

        def on_train_start(self) -> None:
            task.attempt(self.batch_size)

        def on_train_batch_end(self, *_: Any) -> None:
            task.step()

    return Module()


def _transformers(task: Task) -> Found:
    """A real Trainer with ``auto_find_batch_size``; training on is a second ``train()`` at the size found."""
    import transformers

    _quiet("transformers")
    workload = task.workload

    class Counter(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            task.attempt(state.train_batch_size)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            task.step()

    arguments = transformers.TrainingArguments(
        output_dir=".",
        per_device_train_batch_size=START_OF_LANGUAGE_MODELS,
        auto_find_batch_size=True,
        max_steps=STEPS,
        bf16=workload.precision == "bf16",
        max_grad_norm=0,  # the workloads clip nothing
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=task.place.device == "cpu",
    )
    trainer = transformers.Trainer(
        model=workload.model,
        args=arguments,
        train_dataset=range(START_OF_LANGUAGE_MODELS * (STEPS_AFTER + 1)),  # type: ignore[arg-type]
        data_collator=lambda items: workload.sample(len(items)),
        optimizers=(workload.optimizer, None),
        callbacks=[Counter()],
    )
    trainer.train()
    answer = task.attempts[-1][0]

    def go_on() -> None:
        arguments.auto_find_batch_size, arguments.max_steps = False, STEPS_AFTER
        trainer.train()

    return Found(answer=answer, go_on=go_on)


def _quiet(*names: str) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_all() -> None:
    """Everything that a search or a workload imports, so that forks have it already and no clock counts it."""
    for module in ("torch._dynamo", "torchvision", "transformers", "accelerate", "lightning", "autobatch.probe.finder"):
        with contextlib.suppress(ImportError):  # it is then missing in the rows too, with its error
            __import__(module)


_STARTS = f"{START_OF_LANGUAGE_MODELS} (language models) or {START}"
_EXACT = {"multiple_of": 1, "headroom": 0.0}
PEERS = {
    "autobatch": Peer(
        search=_autobatch(live=False), about="find(function), defaults", limits_itself=True, owns_workload=True
    ),
    "autobatch exact": Peer(
        search=_autobatch(live=False, **_EXACT),
        about="find(function, multiple_of=1, headroom=0)",
        limits_itself=True,
        owns_workload=True,
    ),
    "autobatch live": Peer(search=_autobatch(live=True), about="find(Workload) in the process", limits_itself=True),
    "doubling": Peer(search=_doubling, about="doubling with bisection"),
    "Lightning binsearch": Peer(search=_lightning("binsearch"), about='Tuner.scale_batch_size(mode="binsearch")'),
    "Lightning power": Peer(search=_lightning("power"), about='Tuner.scale_batch_size(mode="power")'),
    "accelerate": Peer(search=_accelerate(None), about=f"find_executable_batch_size, from {_STARTS}"),
    "accelerate 128": Peer(search=_accelerate(128), about="find_executable_batch_size, from its default 128"),
    "HF Trainer": Peer(
        search=_transformers,
        about=f"auto_find_batch_size, from {START_OF_LANGUAGE_MODELS}",
        takes=lambda workload: workload in LANGUAGE_MODELS,
    ),
    "toma": Peer(search=_toma, about=f"its rule, halving, from {_STARTS}"),
}
