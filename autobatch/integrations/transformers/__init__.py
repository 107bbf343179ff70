"""transformers ``Trainer`` and what derives from it: trl's ``SFTTrainer``, the trainers of sentence-transformers.

::

    trainer = Trainer(model, args, train_dataset=dataset)
    autobatch.tune(trainer, effective_batch_size=512)
    trainer.train()

``train()`` itself gets the trainer ready for the trials: recomputed activations, special tokens, NEFTune, the
optimizer, what Accelerate makes of the model. Where its loop would begin, the search runs in its place, by the
trainer's own ``training_step`` and ``prediction_step``. Afterwards everything is as it was, but for the numbers.

Running out of memory in the middle of a run is not recovered from: no callback is told when a training step raises, and
the loop does not go on after it. What ``auto_find_batch_size`` does instead is start again, with weights that were
already updated and fewer samples a step; so it is turned off. Where samples differ in length, the longest are tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from autobatch.errors import InvalidArgumentError, UnsupportedTrainerError
from autobatch.integrations.loaders import Source, source_of
from autobatch.integrations.missing import needed
from autobatch.integrations.sizes import WHOLE_COMMAND, searched, share_of
from autobatch.integrations.transformers.trials import Loop, as_it_was, modules_of, stay_alone
from autobatch.result import BatchSizeResult
from autobatch.training.plan import AccumulationPlan

with needed("transformers"):
    import transformers
    from transformers.trainer_utils import TrainerMemoryTracker

__all__ = ["handles", "tune"]

_COMPARING = ("MultipleNegatives", "MegaBatch", "GIST", "BatchAll", "BatchHard", "BatchSemiHard")
"""Losses, by parts of their names, that compare the samples of a batch with each other."""


def handles(trainer: Any) -> bool:
    """Whether ``trainer`` is a Trainer of transformers, or of what derives from it."""
    return isinstance(trainer, transformers.Trainer)


def tune(
    trainer: Any,
    model: Any = None,
    data: Any = None,
    *,
    optimizer: Any = None,
    loss_fn: Any = None,
    effective_batch_size: int | None = None,
    **find_options: Any,
) -> BatchSizeResult:
    """Gives the arguments of the trainer the largest batches that fit, and the accumulation steps.

    Args:
        trainer: one whose ``train()`` was not called yet. If it has an ``eval_dataset``, evaluation is tried as well,
            with the outputs alive that its loop keeps for ``compute_metrics``.
        model, data, optimizer, loss_fn: None, for the trainer has its own.
        effective_batch_size: samples of an optimizer step over all ranks; None for no accumulation.
        find_options: of :func:`autobatch.find`.

    Raises:
        InvalidArgumentError: an argument is wrong.
        UnsupportedTrainerError: the trainer has begun, shards its model, or cannot be given a batch size.
        DoesNotFitError: not even one sample fits.
    """
    for name, value in {"model": model, "data": data, "optimizer": optimizer, "loss_fn": loss_fn}.items():
        if value is not None:
            raise InvalidArgumentError(name, type(value).__name__, "left out: the trainer has its own")
    for reason in _reasons_against(trainer):
        raise UnsupportedTrainerError(reason)
    world_size = trainer.args.world_size
    share = share_of(effective_batch_size, world_size)
    with as_it_was(trainer):
        source, *evaluation = _sources(trainer)

        def search(model: nn.Module) -> tuple[BatchSizeResult, AccumulationPlan]:
            return searched(
                Loop(trainer, model, source, evaluation, share),
                effective_batch_size=effective_batch_size,
                world_size=world_size,
                find_options=find_options,
            )

        result, plan = _in_place_of_its_loop(trainer, search)
    notes = (_set(trainer, plan, result.eval_batch_size), *_about_losses(trainer, plan))
    return replace(result, notes=(*result.notes, *notes))


def _in_place_of_its_loop(
    trainer: Any, run: Callable[[nn.Module], tuple[BatchSizeResult, AccumulationPlan]]
) -> tuple[BatchSizeResult, AccumulationPlan]:
    """What ``run(model)`` gives where the loop of ``train()`` would begin, with the model that the loop would have."""

    def loop(*_: Any, **__: Any) -> Any:
        trainer.accelerator.free_memory()
        stay_alone(trainer)
        return run(_prepared(trainer))

    trainer._inner_training_loop = loop
    trainer.args.auto_find_batch_size = False
    trainer.model_init = None  # the model that it has made is as large as the one that train() would make
    trainer._memory_tracker = TrainerMemoryTracker(skip_memory_metrics=True)  # or a thread would begin to watch
    found: tuple[BatchSizeResult, AccumulationPlan] = transformers.Trainer.train(trainer)
    return found


def _prepared(trainer: Any) -> nn.Module:
    """The model as the loop has it, once the trainer has its optimizer and its schedule."""
    args = trainer.args
    if isinstance(trainer, transformers.Seq2SeqTrainer):  # as its evaluate() does
        told = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
        trainer._gen_kwargs = {name: value for name, value in told.items() if value is not None}
    # Only a schedule asks for it, and a trial does not get far in that.
    steps = args.max_steps if args.max_steps > 0 else max(1, int(args.num_train_epochs * len(trainer.train_dataset)))
    if hasattr(trainer, "_prepare_for_training"):
        model, _ = trainer._prepare_for_training(steps, None, None)
        return model  # type: ignore[no-any-return]
    # Before transformers 5.3 this stands amid the loop.
    if args.gradient_checkpointing and not hasattr(args, "activation_checkpointing"):
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    return model  # type: ignore[no-any-return]


def _sources(trainer: Any) -> Iterator[Source]:
    """The samples of training, then those of each evaluation."""
    yield _source(trainer, "the training loader", trainer.get_train_dataloader)
    if isinstance(trainer.eval_dataset, dict):
        for name in trainer.eval_dataset:
            make = functools.partial(trainer.get_eval_dataloader, name)
            yield _source(trainer, f"the evaluation loader {name!r}", make)
    elif trainer.eval_dataset is not None:
        yield _source(trainer, "the evaluation loader", trainer.get_eval_dataloader)


def _source(trainer: Any, name: str, make: Callable[[], Any]) -> Source:
    """The samples of the loader that ``make()`` makes, with another batch size than now, to see whether it takes it."""
    args = trainer.args
    before = args.per_device_train_batch_size, args.per_device_eval_batch_size, trainer._train_batch_size
    size = 5 if 3 in before else 3
    args.per_device_train_batch_size = args.per_device_eval_batch_size = trainer._train_batch_size = size
    try:
        loader = make()
    except ValueError as exc:
        raise UnsupportedTrainerError(f"{name} cannot be made for {size} samples a batch, as for any: {exc}") from exc
    finally:
        args.per_device_train_batch_size, args.per_device_eval_batch_size, trainer._train_batch_size = before
    source = source_of(loader, name, remade=True)
    if source.batch_size != size:
        raise UnsupportedTrainerError(
            f"{name} has a batch sampler of its own: it draws {source.batch_size} samples at once where the arguments "
            f"say {size}; it must draw what they say"
        )
    return source


def _set(trainer: Any, plan: AccumulationPlan, eval_batch_size: int | None) -> str:
    """Gives the trainer its numbers, as it would have them of arguments like these. A sentence for a person."""
    args = trainer.args
    numbers = {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.steps,
        "per_device_eval_batch_size": eval_batch_size,
    }
    known = {name: number for name, number in numbers.items() if number is not None}
    for name, number in known.items():
        setattr(args, name, number)
    trainer._train_batch_size = args.train_batch_size
    if trainer.accelerator.gradient_accumulation_steps != 1:
        # So transformers 5.2 to 5.7 has the loss divided once more, by what the steps were when the trainer was made.
        trainer.accelerator.gradient_accumulation_steps = 1
    said = f"Set in the trainer's arguments: {', '.join(f'{name}={number}' for name, number in known.items())}"
    if args.auto_find_batch_size:
        args.auto_find_batch_size = False
        said += ", and auto_find_batch_size=False, which would start again with fewer samples a step"
    return f"{said}."


def _about_losses(trainer: Any, plan: AccumulationPlan) -> Iterator[str]:
    """What accumulation does not make up for."""
    parts = [type(part).__name__ for module in modules_of(trainer) for part in module.modules()]
    for name in dict.fromkeys(name for name in parts if any(kind in name for kind in _COMPARING)):
        if plan.steps > 1:
            yield (
                f"{name} compares the samples of a micro-batch with each other: {plan.steps} of "
                f"{plan.micro_batch_size} are not the same to it as one of {plan.steps * plan.micro_batch_size}."
            )


def _reasons_against(trainer: Any) -> Iterator[str]:
    """Why the trainer cannot be tuned. Nothing is touched."""
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_in_train:
        yield "the trainer is running, or its train() ended with an error; it must be one that was not started"
    if trainer.state.global_step:
        yield f"the trainer has run {trainer.state.global_step} steps; it must be one that was not started"
    if trainer.train_dataset is None:
        yield "the trainer has no train_dataset"
    if hasattr(args, "num_generations"):
        yield (
            f"{type(trainer).__name__} generates what it trains on, in batches that its arguments have fixed already; "
            "autobatch probe -- COMMAND tries it as a whole"
        )
    if isinstance(trainer.train_dataset, dict):
        kind = type(trainer.train_dataset).__name__
        yield f"train_dataset is a {kind}, and each batch comes from one of its data sets; it must be one data set"
    if trainer.is_deepspeed_enabled:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        yield f"the trainer hands its model to DeepSpeed (ZeRO stage {stage}), and {WHOLE_COMMAND}"
    if trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False):
        yield f"the trainer shards its model with FSDP, and {WHOLE_COMMAND}"
    if getattr(accelerator, "parallelism_config", None) is not None or _is_sharded(trainer):
        yield f"the model is shared out over ranks, and {WHOLE_COMMAND}"
    if args.n_gpu > 1:
        yield (
            f"one process trains on {args.n_gpu} GPUs (DataParallel); start one for each: torchrun --nproc-per-node "
            f"{args.n_gpu}, or show it one by CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_model_parallel:
        yield "the model is spread over several devices (device_map); it must be on one"
    yield from _settings_against(args, accelerator)


def _settings_against(args: Any, accelerator: Any) -> Iterator[str]:
    way = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if way != "NO" and not way.startswith("MULTI_") and way not in ("DEEPSPEED", "FSDP"):
        yield f"the trainer runs with {way}; it must run in one process or in DistributedDataParallel"
    if accelerator.split_batches:
        yield "accelerator_config.split_batches=True shares one batch out over the ranks; it must be False"
    if args.use_liger_kernel:
        yield "use_liger_kernel=True changes transformers for good; it must be False, with Liger applied to the model"
    if "layerwise" in str(args.optim):
        yield f"optim={str(args.optim)!r} steps amid the backward pass, by hooks that stay; it must be another"
    if args.world_size > 1:
        if accelerator.dispatch_batches:
            yield "accelerator_config.dispatch_batches=True has one rank draw for all; it must be False"
        if args.torch_compile:
            yield "torch_compile=True compiles DistributedDataParallel too; with several ranks it must be False"
        if getattr(args, "ddp_static_graph", False):
            yield "ddp_static_graph=True learns from the first step of a run; it must be left out"


def _is_sharded(trainer: Any) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters())
