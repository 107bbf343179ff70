"""What of a run goes into a checkpoint, and how it comes back: everything that decides its further bits."""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autobatch.errors import AutobatchWarning, CheckpointError
from autobatch.ranks import Ranks
from autobatch.training import checkpoint as checkpoints
from autobatch.training.accumulator import Accumulator
from autobatch.training.checkpoint import Checkpoint
from autobatch.training.events import Evaluation
from autobatch.training.loop import Position
from autobatch.training.module_state import set_unsaved_state, unsaved_state
from autobatch.training.noise import NoiseScale
from autobatch.training.shards import in_parts, optimizer_in_parts, whole, whole_state
from autobatch.training.sizing import Sizes


class Saved:
    """The state of a run on disk and back.

    Args:
        optimizers: in their order.
        parts: what else has ``state_dict`` and ``load_state_dict``, by name; None where a run has no such part.
        noise: likewise, but a run may go on with or without it.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        optimizers: Sequence[Any],
        parts: Mapping[str, Any],
        noise: NoiseScale | None,
        ranks: Ranks,
    ) -> None:
        self._accumulator, self._optimizers, self._ranks = accumulator, list(optimizers), ranks
        self._noise = noise
        self._parts = {name: part for name, part in parts.items() if part is not None}

    def check(self) -> None:
        """Warns where ranks have different libraries."""
        each = self._ranks.gather(checkpoints.versions())
        if any(versions != each[0] for versions in each):
            told = "; ".join(f"rank {rank} has {versions}" for rank, versions in enumerate(each))
            warnings.warn(f"the ranks run different versions: {told}", AutobatchWarning, stacklevel=4)

    def write(self, folder: Path, position: Position, sizes: Sizes, order: Mapping[str, Any], *, keep: int) -> Path:
        """Writes a checkpoint, on rank 0 alone; gives its folder. ``order`` is what decides how samples come.

        Of a sharded model rank 0 has the whole on its host meanwhile, the optimizer's state included.
        """
        is_writer, is_sharded = self._ranks.rank == 0, self._accumulator.is_sharded
        made: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def make() -> None:
            if is_writer or is_sharded:
                made.append((self._module.state_dict(), self._rest(position, sizes)))

        self._ranks_agree(make)  # what cannot be made is known before ranks wait for each other's parts
        if is_sharded:
            made = [(whole_state(self._module, is_kept=is_writer), whole(made[0][1], is_kept=is_writer))]
        own = {
            "random": _random_numbers(self._accumulator.passes.devices),
            "accumulator": self._accumulator.state_dict(),
            "unsaved": unsaved_state(self._modules),
            # Nothing makes these equal where the model is sharded.
            "buffers": dict(self._module.named_buffers()) if is_sharded else {},
        }
        of_ranks = self._ranks.gather(own)
        path = Path()

        def written() -> None:
            nonlocal path
            if is_writer:
                weights, rest = made[0]
                all_else = rest | {"ranks": of_ranks, "order": dict(order)}
                path = checkpoints.write(folder, self._accumulator.windows, weights, all_else, keep=keep)

        self._ranks_agree(written)
        return self._ranks.broadcast(path)

    def read(self, path: Path) -> Checkpoint:
        """A checkpoint that belongs to this run. Nothing is loaded yet.

        Raises:
            CheckpointError: if it is not whole, or of another model or optimizer.
        """
        checkpoint: list[Checkpoint] = []

        def read() -> None:
            checkpoint.append(checkpoints.read(path))
            self._check(checkpoint[0])

        self._ranks_agree(read)
        if checkpoint[0].versions != checkpoints.versions():
            told = f"{path} was written by {dict(checkpoint[0].versions)}, and this is {checkpoints.versions()}"
            warnings.warn(f"{told}: the run may go on with other bits", AutobatchWarning, stacklevel=3)
        return checkpoint[0]

    def restore(self, checkpoint: Checkpoint, sizes: Sizes) -> Position:
        """Puts everything back, in place; gives how far the run was. A micro-batch that had been halved stays so where
        the run begins with the same ``sizes``."""
        position: list[Position] = []
        self._ranks_agree(lambda: position.append(self._restored(checkpoint, sizes)))
        return position[0]

    def _restored(self, checkpoint: Checkpoint, sizes: Sizes) -> Position:
        rest = checkpoint.rest
        self._module.load_state_dict(in_parts(dict(checkpoint.weights), self._module.state_dict()))
        for optimizer, state in zip(self._optimizers, rest["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_in_parts(state, optimizer))
        for name, part in self._parts.items():
            part.load_state_dict(in_parts(rest["parts"][name], part.state_dict()))
        if self._noise is not None and rest["noise"] is not None:
            self._noise.load_state_dict(rest["noise"])
        # A rank that there was not takes what rank 0 had, but for its random numbers.
        is_known = self._ranks.rank < len(rest["ranks"])
        own = rest["ranks"][self._ranks.rank if is_known else 0]
        set_unsaved_state(self._modules, own["unsaved"])
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in own["buffers"]:
                    buffer.copy_(own["buffers"][name])
        state = own["accumulator"]
        if tuple(rest["sizes"]["micro_batch_sizes"]) != sizes.micro_batch_sizes:
            state = {**state, "micro_batch_size": self._accumulator.micro_batch_size}
        self._accumulator.load_state_dict(state)
        position = dict(rest["position"])
        if position["loss_sum"] is not None:
            position["loss_sum"] = position["loss_sum"].to(self._device)
        position["evaluations"] = [Evaluation(**found) for found in position["evaluations"]]
        if is_known:
            _set_random_numbers(own["random"])
        return Position(**position)

    @property
    def _module(self) -> nn.Module:
        return self._accumulator.module

    @property
    def _modules(self) -> list[nn.Module]:
        return [self._module, *self._accumulator.passes.modules[1:]]

    @property
    def _device(self) -> torch.device:
        return self._accumulator.passes.device

    @property
    def _kinds(self) -> list[str]:
        """What holds the state: that of one kind is nothing to another."""
        parts = [f"{name} {type(part).__name__}" for name, part in sorted(self._parts.items())]
        return [*(type(optimizer).__name__ for optimizer in self._optimizers), *parts]

    def _rest(self, position: Position, sizes: Sizes) -> dict[str, Any]:
        return {
            "position": dataclasses.asdict(position),
            "sizes": dataclasses.asdict(sizes),
            "kinds": self._kinds,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "noise": None if self._noise is None else self._noise.state_dict(),
        }

    def check_order(self, checkpoint: Checkpoint, order: Mapping[str, Any]) -> None:
        """Raises CheckpointError where a run would go on amid an epoch whose samples come otherwise than they did."""
        theirs, window = checkpoint.rest["order"], checkpoint.rest["position"]["window"]
        changed = [name for name in order if theirs[name] != order[name]]
        if window and changed:
            said = ", ".join(f"{name} was {theirs[name]}, and is {order[name]}" for name in changed)
            raise CheckpointError(
                f"{checkpoint.path}: amid an epoch, after window {window}, where some samples would be seen twice or "
                f"not at all: {said}"
            )

    def _check(self, checkpoint: Checkpoint) -> None:
        checkpoints.check_same(checkpoint, self._module.state_dict())
        theirs = [_shape(state["param_groups"]) for state in checkpoint.rest["optimizers"]]
        ours = [_shape(optimizer.param_groups) for optimizer in self._optimizers]
        if theirs != ours:
            said = f"of other optimizers: parameters by group are {theirs}, and {ours} here"
            raise CheckpointError(f"{checkpoint.path}: {said}")
        if checkpoint.rest["kinds"] != self._kinds:
            said = f"of a run with {', '.join(checkpoint.rest['kinds'])}, where this has {', '.join(self._kinds)}"
            raise CheckpointError(f"{checkpoint.path}: {said}")

    def _ranks_agree(self, function: Any) -> None:
        self._accumulator.agreed(function)


def _shape(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _random_numbers(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The state of each generator, in tensors and numbers."""
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        name, keys, *others = numpy.random.get_state()
        states["numpy"] = [name, keys.tolist(), *others]
    states["devices"] = {
        str(device): module.get_rng_state(device)
        for device in devices
        if (module := _generators_of(device)) is not None
    }
    return states


def _set_random_numbers(states: Mapping[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if "numpy" in states and (numpy := sys.modules.get("numpy")):
        name, keys, *others = states["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *others))
    for name, state in states["devices"].items():
        _generators_of(torch.device(name)).set_rng_state(state, name)


def _generators_of(device: torch.device) -> Any:
    module = None if device.type == "cpu" else torch.get_device_module(device.type)
    return module if hasattr(module, "get_rng_state") else None
