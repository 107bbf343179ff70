"""What is trained: a model, its optimizer, its loss, and a batch of n samples.

A workload knows how to run one training step, or one evaluation, of n samples. It knows nothing of a
device's memory.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.within import Extent
from autobatch.probe.workload.arguments import check_functions, check_model, check_options, optimizers_of
from autobatch.probe.workload.batch import move, tensors
from autobatch.probe.workload.data import Batches, DatasetBatches, batches_of
from autobatch.probe.workload.ema import update_of
from autobatch.probe.workload.forward import device_of, forward, local
from autobatch.probe.workload.scaling import forget_step, scale_by_one


class Workload:
    """A training run in small: everything that decides how much memory a batch of n samples needs.

    Args:
        model: what is trained. Its parameters must be on the device that is probed.
        optimizer: stepped once a training step, or several in a list, one after the other; without one, only forward
            and backward run.
        loss_fn: ``loss_fn(output, target)`` for batches that are a pair, else ``loss_fn(output, batch)``. Without it
            the model returns the loss itself: the output, its ``loss`` attribute or item, or the first of a tuple.
        sample: where batches come from. ``sample(n)`` makes a batch of n samples, each as large as the largest of the
            run. Or a data set with a length and samples by number: its n longest are tried, no more than it has; where
            lengths differ, after n a little shorter, and the answer must survive shuffled batches too. Or one example
            batch, whose tensors are tiled or cut along their first dimension; a list is one unless ``collate_fn`` or
            ``length`` is given.
            A batch may live on the host: it is moved to the model's device in every step, as in training. A mapping
            is given to the model as keywords; with ``loss_fn`` a pair is ``(input, target)``; without, a tuple is
            given as positional arguments; anything else is the model's one argument.
        collate_fn: makes a batch of a list of samples of the data set, as for a DataLoader; torch's own if not given.
        length: what makes a sample of the data set long: a function of one sample, or a sequence with the length of
            each. Without it samples are measured by the elements of their tensors and lists: at most 4096 of them,
            spread over the data set. A fresh process that builds the workload does so anew.
        evaluate: ``evaluate(n)`` runs an evaluation of n samples; without it, a forward pass and the loss of
            ``sample(n)`` without gradients is what evaluation means.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` for autocast (``fp16`` with a GradScaler). None leaves
            precision to the model.
        scheduler: a learning-rate scheduler. A trial does not step it: that takes no memory, and schedules end.
        scaler: the GradScaler to use; made for ``precision="fp16"`` if not given.
        max_grad_norm: gradients are clipped to this norm before the optimizer steps.
        accumulate: True if training will accumulate gradients: then two micro-batches are run a step, since the
            gradients of the first are alive in the second.
        ema: an averaged copy of the weights, updated after every optimizer step: an object with
            ``update_parameters(model)`` (torch's AveragedModel) or ``update(model)`` (timm's), or a function of the
            model, whose copy then belongs into ``extra_state``.
        keep_outputs: so many outputs of the last steps stay alive, detached, as where metrics are computed from them.
            The present step's output is alive through its backward pass in any case, as in ``output = model(x)``; a
            loop that holds none may fit more.
        extra_state: further objects that a step changes and a probe must put back (a sampler, a metric, ...).
        mode: what to find the largest batch of: ``"train"``, ``"eval"`` or ``"both"``.
        name: for people; the model's class name if not given.

    Raises:
        InvalidArgumentError: naming the argument, if one is of the wrong kind.
    """

    step: Callable[[int], Any] | None = None
    """The function of :meth:`from_step`; None for a workload that has a model."""

    identity: tuple[Any, ...] = ()
    """What else tells this workload from others, for a cache: values, and functions and classes whose code counts."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        sample: Any = None,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        length: Callable[[Any], float] | Sequence[float] | None = None,
        evaluate: Callable[[int], Any] | None = None,
        precision: str | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        max_grad_norm: float | None = None,
        accumulate: bool = False,
        ema: Any = None,
        keep_outputs: int = 0,
        extra_state: Sequence[Any] = (),
        mode: str = "train",
        name: str | None = None,
    ) -> None:
        check_model(model, optimizer, scheduler, scaler)
        check_functions(loss_fn=loss_fn, evaluate=evaluate)
        check_options(
            precision=precision,
            max_grad_norm=max_grad_norm,
            accumulate=accumulate,
            keep_outputs=keep_outputs,
            extra_state=extra_state,
            mode=mode,
            name=name,
        )
        self._update_ema = update_of(ema)
        self.model, self.optimizer, self.loss_fn, self.ema = model, optimizer, loss_fn, ema
        self.sample: Batches = batches_of(sample, collate_fn, length)
        self.precision, self.scheduler, self.scaler = precision, scheduler, scaler
        self.max_grad_norm, self.accumulate, self.mode = max_grad_norm, accumulate, mode
        self.extra_state = tuple(extra_state)
        self.name: str = name or type(getattr(local(model), "_orig_mod", local(model))).__name__
        self._evaluate = evaluate
        self._last: Any = None
        self._kept: collections.deque[list[Tensor]] = collections.deque(maxlen=keep_outputs)
        self._slots: list[tuple[MutableMapping[Any, Any], set[int]]] = []
        if precision == "fp16" and scaler is None:
            self.scaler = torch.amp.GradScaler(self.device.type)

    @classmethod
    def from_step(cls, step: Callable[[int], Any], *, state: Sequence[Any] = (), name: str | None = None) -> Workload:
        """A workload of which only ``step(n)`` is known: it runs one training step on n samples.

        ``state`` names what a step changes and a probe must put back: modules, optimizers, schedulers, scalers,
        generators, anything with ``state_dict`` and ``load_state_dict``.
        """
        return _StepWorkload(step, state=state, name=name)

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer is; the host for a model that has none."""
        return device_of(self.model)

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """None, one or several, in the order in which they step."""
        return optimizers_of(self.optimizer)

    @property
    def stateful(self) -> tuple[Any, ...]:
        """Every object that a step may change."""
        others = (self.scheduler, self.scaler, self.loss_fn, self.ema, *self.extra_state)
        return tuple(item for item in (self.model, *self.optimizers, *others) if item is not None)

    def to(self, torch_device: str) -> None:
        """Moves the model (its parameters in place, so the optimizer still holds them) to ``torch_device``."""
        self.model.to(torch_device)
        for module in (self.loss_fn, self.ema):
            if isinstance(module, nn.Module):
                module.to(torch_device)
        if self.precision == "fp16" and self.scaler is not None and self.scaler._device != self.device.type:
            self.scaler = torch.amp.GradScaler(self.device.type)

    def data(self) -> dict[str, Extent]:
        """What there is to draw from in each mode; a mode whose batches come from a function is left out."""
        if not isinstance(self.sample, DatasetBatches):
            return {}
        return dict.fromkeys(("train", "eval") if self._evaluate is None else ("train",), self.sample.extent)

    def shuffled(self, seed: int) -> Batches:
        """What a step can take its batches from in place of :attr:`sample`: a data set in shuffled order."""
        return self.sample.shuffled(seed) if isinstance(self.sample, DatasetBatches) else self.sample

    def shorter(self) -> Batches | None:
        """What a step can take a batch a little shorter than the worst from; None where all are of one length."""
        return self.sample.shorter if isinstance(self.sample, DatasetBatches) and self.sample.extent.varies else None

    def train_step(self, batch_size: int, sample: Batches | None = None) -> None:
        """One whole training step of ``batch_size`` samples, two micro-batches of it with ``accumulate``."""
        self.model.train()
        for _ in range(2 if self.accumulate else 1):
            loss = self._run_forward(batch_size, sample)
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        self._update()

    def eval_step(self, batch_size: int, sample: Batches | None = None) -> None:
        """One evaluation of ``batch_size`` samples, without gradients."""
        if self._evaluate is not None:
            self._evaluate(batch_size)
            return
        self.model.eval()
        with torch.no_grad():
            self._run_forward(batch_size, sample)

    def begin(self) -> None:
        """Notes what the optimizers hold: what steps add to it, :meth:`forget` takes away."""
        states = [item.state for item in self.stateful if isinstance(item, torch.optim.Optimizer)]
        self._slots = [(state, set(map(id, state))) for state in states]

    def scale_by_one(self) -> None:
        """Lets every training step reach the optimizer, whatever the scale of the loss was.

        Of a step function those scalers that ``state`` names itself, not what hangs from them.
        """
        for item in self.stateful:
            scale_by_one(item)

    def forget(self) -> None:
        """Drops what steps leave alive: gradients, the last step's batch, outputs and loss, and optimizer state.

        A step that finds the optimizer's state there needs less than training's first steps, which create it between
        the activations: on a virtual 80 GiB GPU, GPT-2 fits at 42 in the one way and at 39 in the other.
        """
        self._last = None
        self._kept.clear()
        self._zero_grad()
        for item in self.stateful:
            forget_step(item)
        for state, known in self._slots:
            for parameter in [key for key in state if id(key) not in known]:
                del state[parameter]

    def _zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _run_forward(self, batch_size: int, sample: Batches | None) -> Tensor:
        batch = move((sample or self.sample)(batch_size), self.device)
        output, loss = forward(self.model, self.loss_fn, batch, precision=self.precision, device=self.device)
        # In a loop written by hand, `output = model(batch)` keeps the last step's output alive until here.
        self._last = (batch, output, loss)
        self._keep([tensor.detach() for tensor in tensors(output)])
        return loss

    def _keep(self, output: list[Tensor]) -> None:
        """Keeps ``output``; the first fills all the places, for a trial is shorter than the run that fills them."""
        self._kept.append(output)
        while len(self._kept) < (self._kept.maxlen or 0):
            self._kept.append([tensor.clone() for tensor in output])

    def _update(self) -> None:
        if self.max_grad_norm is not None:
            if self.scaler is not None:
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            if self.scaler is not None:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler is not None and self.optimizers:
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        if self._update_ema is not None:
            self._update_ema(self.model)


class _StepWorkload(Workload):
    """A workload of which nothing is known but a function that runs one step."""

    def __init__(self, step: Callable[[int], Any], *, state: Sequence[Any] = (), name: str | None = None) -> None:
        if not callable(step):
            raise InvalidArgumentError("step", step, "a function of n that trains one step on n samples")
        self.step, self.extra_state = step, tuple(state)
        self.sample = step  # it makes its batches itself
        self._last, self._slots, self._kept = None, [], collections.deque(maxlen=0)
        self.mode = "train"
        self.name = name or str(getattr(step, "__name__", type(step).__name__))

    @property
    def device(self) -> torch.device:
        raise AttributeError("a step function does not say where its model is")

    @property
    def stateful(self) -> tuple[Any, ...]:
        return self.extra_state

    def to(self, torch_device: str) -> None:
        """A step function places its tensors itself."""

    def train_step(self, batch_size: int, sample: Batches | None = None) -> None:
        assert self.step is not None
        if isinstance(self.step(batch_size), Workload):
            allowed = "step(n), or a function that builds a Workload from no argument or from one called 'device'"
            raise InvalidArgumentError("workload", self.name, allowed)

    def eval_step(self, batch_size: int, sample: Batches | None = None) -> None:
        raise InvalidArgumentError("mode", "eval", "train for a workload that is only a step function")

    def _zero_grad(self) -> None:
        for item in self.extra_state:
            if hasattr(item, "zero_grad"):
                item.zero_grad(set_to_none=True)
