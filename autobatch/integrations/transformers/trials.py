"""Steps of a transformers trainer as trials run them, and the trainer as it was before.

Nothing of the library is imported here: all of it hangs from the trainer.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.errors import AutobatchWarning
from autobatch.integrations.loaders import Source
from autobatch.integrations.workload import TrainerWorkload
from autobatch.probe.state import interrupts_deferred, preserved
from autobatch.probe.workload.batch import mapped, move, tensors
from autobatch.probe.workload.data import Batches
from autobatch.probe.workload.forward import device_of, local

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_LOGGERS = ("transformers", "accelerate", "trl", "sentence_transformers")


class Loop(TrainerWorkload):
    """Steps as the loop of ``train()`` takes them, and evaluations as ``evaluate()`` does.

    The loop takes all micro-batches of a window to the device before it runs the first, and has those of the last
    window until then. Two are run: the others are there to take their memory.

    Args:
        trainer: inside ``train()``, with its optimizer prepared.
        model: as the loop has it.
        source, evaluation, share: as for :class:`TrainerWorkload`.
    """

    def __init__(
        self, trainer: Any, model: nn.Module, source: Source, evaluation: list[Source], share: int | None
    ) -> None:
        self._trainer, self._waiting = trainer, 0
        losses = [module for module in modules_of(trainer) if any(p.requires_grad for p in module.parameters())]
        known = (trainer.optimizer, trainer.accelerator.scaler, *losses)
        super().__init__(
            model,
            source,
            self._window,
            share=share,
            evaluation=evaluation,
            evaluate=self._predict_last,
            stateful=[item for item in known if item is not None],
            identity=[type(trainer), trainer.accelerator.mixed_precision, str(trainer.args.optim)],
        )
        ends = [each.extent.samples for each in self._evaluations]
        self.identity += (self._only_loss, trainer.args.eval_accumulation_steps, *ends)

    @property
    def _only_loss(self) -> bool:
        return self._trainer.compute_metrics is None or bool(self._trainer.args.prediction_loss_only)

    def train_step(self, batch_size: int, sample: Batches | None = None) -> None:
        self._waiting = max(0, -(-(self._share or 0) // batch_size) - 2)
        super().train_step(batch_size, sample)

    def _window(self, batches: list[Any]) -> None:
        trainer, accelerator, model = self._trainer, self._trainer.accelerator, local(self.model)
        args, state = trainer.args, accelerator.gradient_state
        window = [move(batch, args.device) for batch in batches]
        window += [_copied(window[-1]) for _ in range(self._waiting)]
        next_window = [_copied(batch) for batch in window]  # the loop lets go of one when it has the other
        del next_window
        window, items = trainer.get_batch_samples(iter(window), len(window), args.device)
        trainer.current_gradient_accumulation_steps = len(window)
        try:
            for number in range(len(batches)):
                state._set_sync_gradients(number + 1 == len(batches))
                trainer.training_step(model, window[number], items)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            trainer.optimizer.step()
            trainer.state.global_step += 1  # `torch_empty_cache_steps` counts by it
        finally:
            state._set_sync_gradients(True)
            trainer.optimizer.zero_grad()  # a loss may have weights as well
            model.zero_grad()

    def _predict_last(self, batch: Any, number: int) -> None:
        """The last batch of an evaluation: the outputs of those before it are alive, as the loop keeps them."""
        args = self._trainer.args
        batch = move(batch, args.device)
        outputs = self._predicted(batch)
        if not outputs or args.batch_eval_metrics:
            return
        samples, kept = len(outputs[0]), self._evaluations[number].extent.samples
        if args.eval_accumulation_steps is not None and args.device.type != "cpu":
            kept = min(kept, args.eval_accumulation_steps * samples)
        if kept <= samples:
            return
        before = [output.new_empty(kept - samples, *output.shape[1:]) for output in outputs]
        last = self._predicted(batch)
        if args.eval_do_concat_batches:
            for pair in zip(before, last, strict=True):
                torch.cat(pair)

    def _predicted(self, batch: Any) -> list[Tensor]:
        """What the loop keeps of a batch: nothing, where only the loss is asked for."""
        trainer, args = self._trainer, self._trainer.args
        _, logits, labels = trainer.prediction_step(trainer.model, batch, self._only_loss)
        if logits is None:
            return []
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        inputs = None
        if "inputs" in args.include_for_metrics:
            inputs = batch[getattr(trainer.model, "main_input_name", "input_ids")]
        return [each for each in tensors(_of_all((logits, labels, inputs), args.world_size)) if each.dim()]


@contextlib.contextmanager
def as_it_was(trainer: Any) -> Iterator[None]:
    """Inside, ``trainer`` may be made ready and be stepped; afterwards all but the values of its tensors is as it was.

    That is the attributes of the trainer and of what belongs to it, random numbers, and where the model is. The values
    are put back by the search. What the library would warn of is left for the run to say.
    """
    home = device_of(trainer.model)
    data = {id(trainer.train_dataset), id(trainer.eval_dataset)}
    saved: dict[int, tuple[Any, Any]] = {}
    for owner in _owners(trainer):
        _save(vars(owner), saved, data)
    with preserved((), str(trainer.args.device)), _silence(), _without_threads_of_tokenizers():
        try:
            yield
        finally:
            with interrupts_deferred():
                for container, contents in saved.values():
                    _put_back(container, contents)
                if device_of(trainer.model) != home:
                    trainer.model.to(home)
    gc.collect()  # what was made for the trials refers to itself, and holds memory


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the libraries would warn of, the run says by itself; a trial in a fork would say it again."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", AutobatchWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers': once a process


@contextlib.contextmanager
def _without_threads_of_tokenizers() -> Iterator[None]:
    """They are not there in a fork, which would wait for them."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ.pop(_PARALLELISM)
        if before is not None:
            os.environ[_PARALLELISM] = before


def stay_alone(trainer: Any) -> None:
    """Makes ``trainer`` ask no other rank for anything: one that runs out of memory would leave the others waiting.

    What is gathered from them is as large, and this rank's own. The caller puts the trainer back.
    """
    ranks, accelerator = trainer.args.world_size, trainer.accelerator
    if ranks == 1:
        return
    accelerator.gather = accelerator.gather_for_metrics = lambda data, *_, **__: _of_all(data, ranks)
    accelerator.reduce = accelerator.pad_across_processes = lambda data, *_, **__: data
    if accelerator.ddp_handler is not None:
        options = {**accelerator.ddp_handler.to_kwargs(), "init_sync": False}  # which would write into the weights
        accelerator.ddp_handler.to_kwargs = lambda: options


def modules_of(trainer: Any) -> list[nn.Module]:
    """The modules that hang from ``trainer``: its model, and a loss or several if it has some."""
    values = [each for value in vars(trainer).values() for each in (value.values() if type(value) is dict else [value])]
    return list({id(value): value for value in values if isinstance(value, nn.Module)}.values())


def _copied(batch: Any) -> Any:
    return mapped(batch, torch.is_tensor, torch.clone)


def _of_all(data: Any, ranks: int) -> Any:
    """``data`` as large as if it had been gathered from so many ranks."""
    if ranks == 1:
        return data
    return mapped(data, torch.is_tensor, lambda part: torch.cat([part if part.dim() else part[None]] * ranks))


def _owners(trainer: Any) -> Iterator[Any]:
    """What training sets attributes of."""
    accelerator = trainer.accelerator
    yield from (trainer, trainer.args, trainer.state, trainer.control, trainer.callback_handler)
    yield from (accelerator, accelerator.gradient_state, accelerator.dataloader_config)
    for part in (accelerator.ddp_handler, trainer.optimizer, trainer.lr_scheduler):
        if part is not None:
            yield part
    for module in modules_of(trainer):
        for part in module.modules():
            yield part
            configs = [getattr(part, name, None) for name in ("config", "generation_config")]
            yield from (each for config in configs if hasattr(config, "to_dict") for each in _with_parts(config))


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    yield from (part for part in vars(config).values() if hasattr(part, "to_dict"))


def _save(value: Any, saved: dict[int, tuple[Any, Any]], without: Iterable[int]) -> None:
    """Notes what is in ``value`` if it is a list or the like, and in those that are in it."""
    if not isinstance(value, (dict, list, set, deque)) or id(value) in saved or id(value) in without:
        return
    saved[id(value)] = (value, copy.copy(value))
    for part in value.values() if isinstance(value, dict) else value:
        _save(part, saved, without)


def _put_back(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(contents)
    else:
        container.extend(contents)
