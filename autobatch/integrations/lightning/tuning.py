"""The search inside a Lightning ``fit()``, and the numbers that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autobatch.errors import UnsupportedTrainerError
from autobatch.integrations.lightning.loaders import (
    EVALUATION_NAMES,
    TRAINING_NAMES,
    Loaders,
    holders_of,
    samples_of_rank,
)
from autobatch.integrations.lightning.trials import trials_of
from autobatch.integrations.sizes import NO_DIVISOR, PLAN_NOTE, exact_plan, searched, share_of
from autobatch.probe.state import preserved
from autobatch.result import BatchSizeResult
from autobatch.training.plan import AccumulationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What was found, and what it is to be given to."""

    result: BatchSizeResult
    plan: AccumulationPlan
    training: Loaders
    evaluation: Loaders | None
    """None where there is no evaluation, or where it is left as it is."""

    def give_to(self, trainer: Any) -> BatchSizeResult:
        """Sets the numbers on ``trainer`` and its loaders. The result, with a note that says so."""
        micro, before = self.plan.micro_batch_size, trainer.accumulate_grad_batches
        said = [f"accumulate_grad_batches={self.plan.steps} of the trainer (was {before})", _said(self.training, micro)]
        trainer.accumulate_grad_batches = self.plan.steps
        self.training.give(micro)
        if self.evaluation is not None and self.result.eval_batch_size is not None:
            said.append(_said(self.evaluation, self.result.eval_batch_size))
            self.evaluation.give(self.result.eval_batch_size)
        notes = (*self.result.notes, f"Set: {'; '.join(said)}.", *_counted(trainer))
        return replace(self.result, notes=notes)


def loaders_of(trainer: Any, names: Sequence[str], *, lasting: bool) -> tuple[Loaders, Loaders | None]:
    """The loaders that ``trainer`` trains with and, where it evaluates amid ``fit()``, those of evaluation.

    Args:
        names: the attributes that loaders made by a hook may follow.
        lasting: whether the hooks will be asked again when the numbers are set.

    Raises:
        UnsupportedTrainerError: if they cannot be given a batch size.
    """
    fit_loop = trainer.fit_loop
    origins = fit_loop._data_source, fit_loop.epoch_loop.val_loop._data_source
    holders = holders_of(trainer.lightning_module, trainer.datamodule)
    if not origins[0].is_defined():
        raise UnsupportedTrainerError(
            "there is no training loader; it must be in data=, or be made by train_dataloader() of the module"
        )
    with preserved((), str(trainer.strategy.root_device)):  # hooks may draw random numbers, and are asked again
        training = Loaders(origins[0], holders, [n for n in TRAINING_NAMES if n in names], is_training=True)
        evaluation = None
        if trainer.enable_validation:
            evaluation = Loaders(origins[1], holders, [n for n in EVALUATION_NAMES if n in names], is_training=False)
    if lasting and not training.is_given and training.attribute is None:
        raise UnsupportedTrainerError(
            f"{type(origins[0].instance).__name__}.train_dataloader() makes a loader anew whenever it is asked, of "
            f"{training.batch_sizes[0]} samples a batch; it must follow an attribute batch_size of the module or data "
            "module, or the loader must be given to fit(). The callback AutoBatch does without either, unless "
            "reload_dataloaders_every_n_epochs is set"
        )
    return training, evaluation if evaluation is not None and evaluation.flat else None


def numbers_of(
    trainer: Any,
    training: Loaders,
    evaluation: Loaders | None,
    *,
    effective_batch_size: int | None,
    find_options: Mapping[str, Any],
    lasting: bool,
) -> Numbers:
    """Searches inside ``fit()``, whose state is as before afterwards. Nothing is set.

    Raises:
        UnsupportedTrainerError: for a step that runs collectives, and for evaluation that cannot be kept within what
            fits there.
    """
    world_size = trainer.world_size
    with trials_of(trainer, training, evaluation, share_of(effective_batch_size, world_size)) as workload:
        result, plan = searched(
            workload,
            effective_batch_size=effective_batch_size,
            world_size=world_size,
            find_options=find_options,
        )
    limits = list(_limits(training, evaluation, result, world_size))
    for most, why in limits:
        if most < plan.micro_batch_size:
            plan = exact_plan(effective_batch_size, most, world_size)
            result = _replanned(result, plan, why)
    if evaluation is not None and _is_left(training, evaluation, lasting=lasting):
        _check_left(training, evaluation, result, plan)
        evaluation = None
    return Numbers(result=result, plan=plan, training=training, evaluation=evaluation)


def plan_in(result: BatchSizeResult) -> AccumulationPlan:
    """The plan that ``result`` has in its environment."""
    return AccumulationPlan(**result.environment["accumulation"])


def last_window_note(trainer: Any, numbers: Numbers) -> str | None:
    """What Lightning does with a last window of an epoch that is shorter than the others; None where there is none."""
    plan, loader = numbers.plan, numbers.training.flat[0]
    samples = samples_of_rank(loader, trainer.world_size)
    batches = samples // plan.micro_batch_size if loader.drop_last else -(-samples // plan.micro_batch_size)
    left = batches % plan.steps
    if not left or trainer.limit_train_batches != 1.0:
        return None
    return (
        f"The last window of an epoch has {left} of {plan.steps} micro-batches, and Lightning gives it "
        f"{left}/{plan.steps} of its weight (Lightning#19987); the callback AutoBatch weighs it by its samples."
    )


def _limits(
    training: Loaders, evaluation: Loaders | None, result: BatchSizeResult, world_size: int
) -> Iterator[tuple[int, str]]:
    """The most samples that a micro-batch may have for another reason than training's memory, and the reason."""
    samples = samples_of_rank(training.flat[0], world_size)
    yield samples, f"A rank draws {samples} samples in an epoch."
    if evaluation is not None and evaluation.attribute is not None and evaluation.attribute == training.attribute:
        most = _most_in_evaluation(evaluation, result)
        if most is not None:
            yield (
                most,
                f"The evaluation loaders follow {training.attribute} too, and no more than {most} fit there; with an "
                "attribute eval_batch_size of their own, training could take more.",
            )


def _most_in_evaluation(evaluation: Loaders, result: BatchSizeResult) -> int | None:
    """The largest batch that fits in evaluation; None where all that there is to evaluate fits at once."""
    most = result.eval_batch_size
    return None if most is None or most >= max(len(each.dataset) for each in evaluation.sources) else most


def _replanned(result: BatchSizeResult, plan: AccumulationPlan, why: str) -> BatchSizeResult:
    known = {"effective_batch_size": plan.effective_batch_size, "accumulation": asdict(plan)}
    notes = [note for note in result.notes if not note.startswith(PLAN_NOTE) and NO_DIVISOR not in note]
    return replace(result, environment={**result.environment, **known}, notes=(*notes, why, f"{PLAN_NOTE} {plan}."))


def _is_left(training: Loaders, evaluation: Loaders, *, lasting: bool) -> bool:
    """Whether the evaluation loaders get no batch size of their own."""
    if evaluation.attribute is not None:
        return evaluation.attribute == training.attribute
    return lasting and not evaluation.is_given


def _check_left(training: Loaders, evaluation: Loaders, result: BatchSizeResult, plan: AccumulationPlan) -> None:
    sizes = set(evaluation.batch_sizes)
    if training.attribute is not None:
        sizes = evaluation.sizes_with(training.attribute, plan.micro_batch_size)
    most = _most_in_evaluation(evaluation, result)
    if most is not None and max(sizes, default=0) > most:
        raise UnsupportedTrainerError(
            f"val_dataloader() makes loaders of {max(sizes)} samples a batch, of which {most} fit; they must follow an "
            "attribute eval_batch_size of the module or data module, or be given to fit()"
        )


def _said(loaders: Loaders, batch_size: int) -> str:
    was = ", ".join(map(str, dict.fromkeys(loaders.batch_sizes)))
    if loaders.attribute is not None:
        return f"{loaders.attribute}={batch_size} of {' and '.join(loaders.owners)} (was {was})"
    plural = "s" if len(loaders.flat) > 1 else ""
    return f"batch_size={batch_size} of the {loaders.title} loader{plural} (was {was})"


def _counted(trainer: Any) -> Iterator[str]:
    """What counts micro-batches, and so means another number of samples now."""
    for name in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if type(value) is int and value:
            yield f"{name}={value} counts micro-batches, whose size has changed."
