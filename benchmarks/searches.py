"""The peers: autobatch, and what else finds a batch size, each around the same :class:`~autobatch.Workload`.

What does not choose its start by itself is given one that is above every answer of the cells, which one would have to
know. toma is not a dependency: its published rule, halving after a failure, is a few lines of our own here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from autobatch.device.oom import is_oom
from autobatch.result import BatchSizeResult
from benchmarks.measure import STEPS, STEPS_AFTER, Found, Peer, Task
from benchmarks.trainers import START_OF_LANGUAGE_MODELS, lightning_module, lightning_trainer, transformers_trainer

START = 2048
"""A power of two above every answer in the cells (1901) and on the host."""
LANGUAGE_MODELS = ("gpt2", "bert", "llama")


def _autobatch(live: bool, **settings: Any) -> Callable[[Task], Found]:
    def search(task: Task) -> Found:
        import autobatch

        source = task.workload if live else task.build
        result = autobatch.find(source, device=task.place.device, memory_limit=task.place.limit_bytes, **settings)
        counts = _counts(result)
        if not live:
            ran = (*result.trials, *result.confirmation)
            measured = [trial.measurement.alloc_retries for trial in ran if trial.measurement is not None]
            counts["retries"] = sum(known) if (known := [n for n in measured if n is not None]) else None
        return Found(answer=result.batch_size, go_on=lambda: task.train(result.batch_size, STEPS_AFTER), counts=counts)

    return search


def _counts(result: BatchSizeResult) -> dict[str, Any]:
    """What a result knows better than the training loop, whose trials run elsewhere or are put back."""
    ran = (*result.trials, *result.confirmation)
    return {
        "trials": result.trial_count,
        "failures": result.oom_count,
        "samples": result.samples_processed,
        "samples_confirming": sum(trial.batch_size * trial.steps for trial in result.confirmation),
        "seconds_confirming": round(sum(trial.duration_s for trial in result.confirmation), 2),
        "asked": [f"{trial.batch_size}{'' if trial.fits else 'x'}" for trial in ran],
    }


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
        from lightning.pytorch.tuner import Tuner

        trainer, module = lightning_trainer(task), lightning_module(task)
        answer = Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=STEPS)
        return Found(answer=answer, go_on=lambda: trainer.fit(module))

    return search


def _transformers(task: Task) -> Found:
    """A real Trainer with ``auto_find_batch_size``; training on is a second ``train()`` at the size found."""
    trainer = transformers_trainer(task, auto_find_batch_size=True, max_steps=STEPS)
    trainer.train()
    answer = task.attempts[-1][0]

    def go_on() -> None:
        trainer.args.auto_find_batch_size, trainer.args.max_steps = False, STEPS_AFTER
        trainer.train()

    return Found(answer=answer, go_on=go_on)


def _tuned_transformers(task: Task) -> Found:
    """The same Trainer through ``tune()``, then ``train()``."""
    import autobatch

    trainer = transformers_trainer(task, max_steps=STEPS_AFTER)
    result = autobatch.tune(trainer, memory_limit=task.place.limit_bytes)
    return Found(answer=result.batch_size, go_on=trainer.train, counts=_counts(result))


def _tuned_lightning(task: Task) -> Found:
    """The same trainer as for its own finder through ``tune()``, then ``fit()``."""
    import autobatch

    trainer, module = lightning_trainer(task), lightning_module(task)
    result = autobatch.tune(trainer, module, memory_limit=task.place.limit_bytes)
    return Found(answer=result.batch_size, go_on=lambda: trainer.fit(module), counts=_counts(result))


def _executable(task: Task) -> Found:
    """Our decorator in the place of accelerate's, from the same size."""
    from autobatch.integrations.accelerate import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=_start(task))
    def train(batch_size: int) -> int:
        task.train(batch_size)
        return batch_size

    return _plain(task, train())


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
TUNERS = {
    "tune transformers": Peer(
        search=_tuned_transformers,
        about="tune(transformers.Trainer)",
        limits_itself=True,
        takes=lambda workload: workload in LANGUAGE_MODELS,
        trains=lambda task, size, steps: transformers_trainer(task, size, max_steps=steps).train(),
    ),
    "tune Lightning": Peer(
        search=_tuned_lightning,
        about="tune(lightning.Trainer, module)",
        limits_itself=True,
        trains=lambda task, size, steps: lightning_trainer(task, steps).fit(lightning_module(task, size)),
    ),
    "find_executable_batch_size": Peer(search=_executable, about=f"ours, from {_STARTS}"),
}
"""autobatch in the trainers that the libraries' own finders are measured in."""
ALL = PEERS | TUNERS
