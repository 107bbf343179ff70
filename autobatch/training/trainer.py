"""Trainer: the probe, exact accumulation and recovery in a training loop that can be killed at any moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autobatch.device.local import resolve_local
from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.arguments import check_count
from autobatch.probe.workload.arguments import check_functions
from autobatch.probe.workload.forward import device_of
from autobatch.ranks import Ranks
from autobatch.result import BatchSizeResult
from autobatch.training.accumulator import Accumulator
from autobatch.training.arguments import (
    check_alike,
    check_extra_state,
    check_find_options,
    check_folder,
    check_probed,
    check_run,
)
from autobatch.training.evaluation import evaluate
from autobatch.training.events import Callback, Evaluation, Event
from autobatch.training.feed import Feed, count_samples
from autobatch.training.folder import Folder
from autobatch.training.loop import Loop, Position
from autobatch.training.noise import NoiseScale
from autobatch.training.progress import Display
from autobatch.training.report import TrainingReport, epoch_line, headline, sizes_line
from autobatch.training.saved import Saved
from autobatch.training.sizing import Sizes, Wanted, probed

_NOISE_EVERY = 4  # windows: one in so many is enough for a figure of two digits, at a quarter of the time


class Trainer:
    """Trains a model at an effective batch of any size, in micro-batches that fit.

    ::

        trainer = autobatch.Trainer(model, optimizer, loss_fn, effective_batch_size=4096, checkpoint="runs/first")
        report = trainer.fit(dataset, epochs=3, eval_dataset=held_out)

    The model trains where it is; one that is in eval mode is put into training mode. With ``micro_batch_size="auto"``
    the largest that fits is found before the first window. A run that was killed goes on amid its epoch when the same
    script is started again, and ends with the same weights as one that never stopped, bit for bit where the computation
    itself is. What a checkpoint holds replaces what the script made, learning rates included; amid an epoch the data
    set, the effective batch and the seed must be those it began with.

    Among the ranks of a torch.distributed job (``torchrun``) each takes its share of every window.

    Args:
        model, optimizer, loss_fn, count, reduction, precision, scaler, scheduler, max_grad_norm, grow_after: as in
            :class:`~autobatch.Accumulator`; the scheduler steps once a window. fp16 gets a scaler if there is none.
        effective_batch_size: samples of a window, over all ranks; None for one micro-batch on each rank.
        micro_batch_size: the most samples of a rank at once; ``"auto"`` probes.
        eval_batch_size: for the evaluation; probed with ``"auto"``, else that of training.
        collate_fn: makes a batch of a list of samples; torch's own if not given.
        length: what makes a sample long, for the probe: as in :class:`~autobatch.Workload`.
        seed: of the order of the samples, and of what is drawn to load them.
        shuffle: False takes them in their own order.
        drop_last: leave out the last window of an epoch if it would have fewer samples.
        workers: processes that load samples; 0 for this one.
        checkpoint: a folder for checkpoints; None for none. They are written at the start, after each epoch and on
            SIGTERM, upon which the process exits with 143.
        checkpoint_every: windows between two of them, beside those.
        keep: so many checkpoints stay.
        extra_state: what else has to go on with a run, by name: anything with ``state_dict`` and ``load_state_dict``,
            such as averaged weights that a callback updates.
        callbacks: functions of an :class:`~autobatch.training.events.Event`.
        progress: show the run on standard error.
        noise: measure the gradient noise scale, which the summary of an epoch tells.
        find_options: further arguments of :func:`~autobatch.find`, such as ``{"headroom": 0.1}``.

    Raises:
        InvalidArgumentError: an argument is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        effective_batch_size: int | None = None,
        micro_batch_size: int | Literal["auto"] = "auto",
        eval_batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        length: Callable[[Any], float] | Sequence[float] | None = None,
        count: Callable[[Any], Any] | None = None,
        reduction: str = "mean",
        precision: str | None = None,
        scaler: Any = None,
        scheduler: Any = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        keep: int = 2,
        extra_state: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        noise: bool = True,
        grow_after: int | None = None,
        find_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_run(
            counts={
                "effective_batch_size": effective_batch_size,
                "eval_batch_size": eval_batch_size,
                "checkpoint_every": checkpoint_every,
                "keep": keep,
                "micro_batch_size": None if micro_batch_size == "auto" else micro_batch_size,
            },
            numbers={"seed": seed, "workers": workers},
            flags={"shuffle": shuffle, "drop_last": drop_last, "progress": progress, "noise": noise},
        )
        check_functions(collate_fn=collate_fn, **{f"callbacks[{i}]": each for i, each in enumerate(callbacks)})
        check_folder(checkpoint, checkpoint_every)
        check_find_options(find_options)
        check_extra_state(extra_state)
        is_whole = check_probed(model, micro_batch_size)
        if precision == "fp16" and scaler is None and isinstance(model, nn.Module):
            scaler = torch.amp.GradScaler(device_of(model).type)
        # Of a sharded model hooks see no gradient.
        self._noise = NoiseScale(every=_NOISE_EVERY) if noise and is_whole else None
        self._loop: Loop | None = None
        self._accumulator = Accumulator(
            model,
            optimizer,
            loss_fn,
            micro_batch_size=1,  # until it is known
            count=count,
            reduction=reduction,
            precision=precision,
            scaler=scaler,
            scheduler=scheduler,
            max_grad_norm=max_grad_norm,
            noise=self._noise,
            grow_after=grow_after,
            on_recovery=lambda recovery: self._loop.recovered(recovery) if self._loop is not None else None,
        )
        self._unwatch()
        self._memory = resolve_local(str(self._accumulator.passes.device))
        self.model, self._loss_fn, self._reduction = model, loss_fn, reduction
        self._training = {"precision": precision, "scaler": scaler, "scheduler": scheduler}
        self._training |= {"max_grad_norm": max_grad_norm, "optimizer": optimizer}
        self._wanted = Wanted(effective_batch_size, micro_batch_size, eval_batch_size)
        self._collate, self._length, self._workers = collate_fn, length, workers
        self._seed, self._keep, self._every = seed, keep, checkpoint_every
        self._shuffle, self._drop_last = shuffle, drop_last
        self._find_options, self._extra_state = dict(find_options or {}), dict(extra_state or {})
        self._ranks = Ranks.here()
        self._folder = Folder(checkpoint, self._accumulator.agreed, is_writer=self._ranks.rank == 0)
        display = [Display()] if progress and self._ranks.rank == 0 else []
        self._callbacks: list[Callback] = [*display, *callbacks]
        self._display = display

    def fit(self, dataset: Any, *, epochs: int = 1, eval_dataset: Any = None, resume: bool = True) -> TrainingReport:
        """Trains on ``dataset``, or goes on with it from the newest checkpoint.

        Args:
            dataset: with a length, and samples by number.
            epochs: in all, those before an interruption included.
            eval_dataset: evaluated at the end of each epoch.
            resume: False refuses a folder that holds checkpoints.

        Raises:
            InvalidArgumentError: an argument is wrong; nothing was touched.
            CheckpointError: a checkpoint is not whole, or of another model; nothing was loaded.
            DoesNotFitError: not even one sample fits.
            RankError: another rank failed.
            SystemExit: with 143, after SIGTERM.
            Exception: what the model or the data set raises for another reason than memory, unchanged.
        """
        self._check_alike(dataset, epochs, eval_dataset, resume)
        with self._folder.locked():
            saved = self._saved()
            found = self._folder.newest(resume)
            loaded = None if found is None else saved.read(found)
            result, sizes = self._sizes(dataset, eval_dataset, None if loaded is None else loaded.rest["sizes"])
            feed = self._feed(dataset, sizes)
            if loaded is not None:
                saved.check_order(loaded, feed.order)
            loop = self._made(feed, eval_dataset, sizes, saved, epochs=epochs)
            if loaded is not None:
                loop.position = saved.restore(loaded, sizes)
            if not self.model.training:
                self.model.train()  # as from_pretrained leaves a model, dropout would do nothing
            self._accumulator.watch()
            self._memory.begin()
            self._memory.reset_peaks()
            try:
                loop.run(headline(result, sizes, loop.position, epochs, found), is_resumed=loaded is not None)
            finally:
                self._unwatch()
                for display in self._display:
                    display.close()
                self._loop = None
        return self._report(loop, sizes, result)

    def evaluate(self, dataset: Any, *, batch_size: int) -> Evaluation:
        """The mean loss over the loss terms of ``dataset``, without gradients.

        Args:
            batch_size: samples at once; halved where memory runs out.

        Raises:
            DoesNotFitError: not even one sample fits.
        """
        check_count("batch_size", batch_size)
        count_samples(dataset)
        return evaluate(
            self._accumulator.passes,
            dataset,
            batch_size=batch_size,
            collate_fn=self._collate,
            workers=self._workers,
            ranks=self._ranks,
            agreed=self._accumulator.agreed,
            reduction=self._reduction,
            in_step=self._accumulator.runs_in_step,
        )

    def _check_alike(self, dataset: Any, epochs: Any, eval_dataset: Any, resume: Any) -> None:
        """Checks the arguments, and that all ranks were given the same: else they would wait for each other."""

        def checked() -> dict[str, Any]:
            check_count("epochs", epochs)
            check_run(counts={}, numbers={}, flags={"resume": resume})
            self._wanted.check(self._ranks)
            return {
                "dataset": f"{count_samples(dataset)} samples",
                "epochs": epochs,
                "eval_dataset": None if eval_dataset is None else f"{count_samples(eval_dataset)} samples",
                "resume": resume,
                "effective_batch_size": self._wanted.effective_batch_size,
                "micro_batch_size": "auto" if self._wanted.micro_batch_size == "auto" else "a number",
                "seed": self._seed,
                "shuffle": self._shuffle,
                "drop_last": self._drop_last,
                "checkpoint": None if self._folder.path is None else str(self._folder.path),
                "checkpoint_every": self._every,
                "noise": self._noise is not None,
                "reduction": self._reduction,
                "precision": self._training["precision"],
                "max_grad_norm": self._training["max_grad_norm"],
            }

        check_alike(self._accumulator.agreed(checked), self._ranks.rank)

    def _unwatch(self) -> None:
        """Between two runs the user's model has no hook of ours."""
        if self._noise is not None:
            self._noise.close()

    def _saved(self) -> Saved:
        optimizer = self._training["optimizer"]
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        parts = {"scheduler": self._training["scheduler"], "scaler": self._training["scaler"], **self._extra_state}
        if isinstance(self._loss_fn, nn.Module) and self._loss_fn.state_dict():
            parts["loss_fn"] = self._loss_fn
        saved = Saved(self._accumulator, optimizers, parts, self._noise, self._ranks)
        if self._folder.path is not None:
            saved.check()
        return saved

    def _feed(self, dataset: Any, sizes: Sizes) -> Feed:
        samples = count_samples(dataset)
        if self._drop_last and samples < sizes.effective_batch_size:
            allowed = f"at most {samples}, the samples there are"
            raise InvalidArgumentError("effective_batch_size", sizes.effective_batch_size, allowed)
        return Feed(
            dataset,
            effective_batch_size=sizes.effective_batch_size,
            micro_batch_sizes=sizes.micro_batch_sizes,
            rank=self._ranks.rank,
            collate_fn=self._collate,
            shuffle=self._shuffle,
            drop_last=self._drop_last,
            seed=self._seed,
            workers=self._workers,
        )

    def _made(self, feed: Feed, eval_dataset: Any, sizes: Sizes, saved: Saved, *, epochs: int) -> Loop:
        self._accumulator.restart(sizes.micro_batch_sizes[self._ranks.rank])
        folder, size = self._folder.path, sizes.eval_batch_size
        self._loop = Loop(
            self._accumulator,
            feed,
            self._ranks,
            epochs=epochs,
            evaluate=None if eval_dataset is None else lambda: self.evaluate(eval_dataset, batch_size=size),
            save=None if folder is None else lambda at: saved.write(folder, at, sizes, feed.order, keep=self._keep),
            save_every=self._every,
            tell=self._tell,
            summary=lambda at, speed: self._summary(at, speed, epochs, sizes),
        )
        return self._loop

    def _sizes(
        self, dataset: Any, eval_dataset: Any, known: Mapping[str, Any] | None
    ) -> tuple[BatchSizeResult | None, Sizes]:
        wanted = self._wanted
        if wanted.micro_batch_size != "auto":
            return None, wanted.of(wanted.micro_batch_size, self._ranks)
        if known is not None and (sizes := wanted.gone_on(known, self._ranks)) is not None:
            return None, sizes
        result = probed(
            self.model,
            dataset,
            eval_dataset,
            device=str(self._accumulator.passes.device),
            loss_fn=self._loss_fn,
            collate_fn=self._collate,
            length=self._length,
            share=wanted.share(self._ranks, per_rank=bool(self._find_options.get("per_rank"))),
            training=self._training,
            options=self._find_options,
        )
        return result, wanted.of(result.batch_size, self._ranks, found=result)

    def _tell(self, event: Event) -> None:
        for callback in self._callbacks:
            callback(event)

    def _summary(self, position: Position, speed: float | None, epochs: int, sizes: Sizes) -> str:
        peak_bytes = self._memory.measure().peak_allocated_bytes
        self._memory.reset_peaks()
        noise = None if self._noise is None else self._noise.batch_size
        first = epoch_line(position, epochs, samples_per_s=speed, peak_bytes=peak_bytes)
        own = sizes.micro_batch_sizes[self._ranks.rank]
        return f"{first}; {sizes_line(own, sizes.effective_batch_size, noise, is_largest=sizes.is_probed)}"

    def _report(self, loop: Loop, sizes: Sizes, result: BatchSizeResult | None) -> TrainingReport:
        return TrainingReport(
            epochs=loop.position.epoch,
            windows=self._accumulator.windows,
            losses=tuple(loop.position.losses),
            evaluations=tuple(loop.position.evaluations),
            plan=sizes.plan,
            micro_batch_size=self._accumulator.micro_batch_size,
            batch_size=result,
            noise_scale=None if self._noise is None else self._noise.batch_size,
        )
