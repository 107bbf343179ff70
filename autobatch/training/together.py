"""What the ranks of a job do together in a window: they count, they agree on how it went, and they add their gradients.

No collective runs between the first forward and the last backward of a window, so a rank that runs out of memory there
strands nobody. Models that run collectives by themselves are the exception: sharded ones, and synchronised batch norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from autobatch.device.oom import classify, first_line
from autobatch.errors import InvalidArgumentError, RankError
from autobatch.ranks import Ranks

T = TypeVar("T")


class Together:
    """The ranks that train one model.

    A model in DistributedDataParallel is run without it: its own way to bring gradients together is a collective amid
    backward. A plain model's weights are made those of rank 0.

    Args:
        model: what is trained, as the user has it.
        loss_fn: if it is a module, its weights are made those of rank 0 too.

    Raises:
        RankError: where the ranks' gradients cannot be brought together, or a rank is gone.
        InvalidArgumentError: for a model that is compiled around DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        self.ranks = Ranks.here()
        self._shares_buffers = False
        self.module = self._unwrapped(model)
        several = self.ranks.are_several
        self.is_sharded = several and _shards(self.module) is not None
        self.talks_in_forward = self.is_sharded or (several and _has(self.module, nn.SyncBatchNorm))
        if not several:
            return
        losses = [loss_fn] if isinstance(loss_fn, nn.Module) else []
        self._check(losses)
        if self.module is model and not self.is_sharded:
            self._shares_buffers = True
            self._made_equal([model, *losses])
        else:
            self._made_equal(losses)

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        if isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel):
            raise InvalidArgumentError(
                "model", "torch.compile(DistributedDataParallel(...))", "compiled inside of DistributedDataParallel"
            )
        if not isinstance(model, DistributedDataParallel):
            return model
        if distributed.get_world_size(model.process_group) != distributed.get_world_size():
            raise RankError("DistributedDataParallel has a process group of its own: only the default group is known")
        self._shares_buffers = model.broadcast_buffers
        return model.module  # type: ignore[no-any-return]

    def _check(self, losses: list[nn.Module]) -> None:
        size = _shards(self.module)
        if size is not None and size != self.ranks.size:
            raise RankError(f"the model is sharded over {size} of {self.ranks.size} ranks: only all of them are known")
        if self.is_sharded:
            named = [pair for module in (self.module, *losses) for pair in module.named_parameters()]
            whole = [name for name, each in named if each.requires_grad and not hasattr(each, "device_mesh")]
            if whole:
                raise RankError(f"{whole[0]} is not sharded, beside parameters that are: shard the whole model")
        for name, module in self.module.named_modules():
            if getattr(module, "sparse", False):
                raise RankError(f"{name or type(module).__name__} has sparse gradients, which are not brought together")

    def _made_equal(self, modules: list[nn.Module]) -> None:
        tensors = [pair for each in modules for pair in (*each.named_parameters(), *each.named_buffers())]
        kinds = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
        theirs = self.ranks.broadcast(kinds)
        self.agreed(lambda: _check_equal(kinds, theirs))
        with torch.no_grad():
            self._talk(lambda: [distributed.broadcast(tensor.detach(), src=0) for _, tensor in tensors])

    def begin(self) -> None:
        """Before a window: every rank has the buffers of rank 0, as DistributedDataParallel makes it."""
        if self.ranks.are_several and self._shares_buffers:
            self._talk(lambda: [distributed.broadcast(buffer, src=0) for buffer in self.module.buffers()])

    def agreed(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` gives on each rank.

        Raises:
            Exception: what it raised here, unchanged; RankError where it raised on another rank.
        """
        if not self.ranks.are_several:
            return [function()]
        failure: BaseException | None = None
        answer: Any = None
        try:
            answer = function()
        except Exception as exc:  # noqa: BLE001 - raised below, once the others know
            failure = exc
        said = None if failure is None else f"{type(failure).__name__}: {first_line(failure)}"
        answers = self.ranks.gather((answer, said))
        if failure is not None:
            raise failure
        for rank, (_, their) in enumerate(answers):
            if their is not None:
                raise RankError(f"rank {rank} failed: {their}")
        return [theirs for theirs, _ in answers]

    def add_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Gives every rank the sum of all ranks' gradients; returns the sum of their losses."""
        if not self.ranks.are_several:
            return loss
        if not self.is_sharded:
            known = [parameter for parameter in parameters if parameter.requires_grad]
            self._filled(known)
            gradients = [parameter.grad for parameter in known if parameter.grad is not None]
            started = self._talk(lambda: [distributed.all_reduce(each, async_op=True) for each in gradients])
            self._talk(lambda: [work.wait() for work in started])
        total = loss.double()  # a rank without a sample does not know the others' kind
        self._talk(lambda: distributed.all_reduce(total))
        return total

    def _talk(self, collective: Callable[[], T]) -> T:
        """Over the job's own group, where the tensors are. Raises RankError where a rank is gone."""
        try:
            return collective()
        except RuntimeError as exc:
            if classify(exc) is not None:
                raise
            said = first_line(exc)
            raise RankError(f"bringing gradients together failed, a rank is gone or silent: {said}") from exc

    def _filled(self, parameters: list[nn.Parameter]) -> None:
        """A parameter that only some ranks have used has a gradient of zeros on the others."""
        masks = self.ranks.gather([parameter.grad is not None for parameter in parameters])
        used = [any(column) for column in zip(*masks, strict=True)]
        if all(mask == used for mask in masks):
            return

        def fill() -> None:
            for parameter, is_used in zip(parameters, used, strict=True):
                if is_used and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

        self.agreed(fill)


def _shards(module: nn.Module) -> int | None:
    """Over how many ranks the parameters are sharded; None where they are not."""
    meshes = [
        mesh for parameter in module.parameters() if (mesh := getattr(parameter, "device_mesh", None)) is not None
    ]
    return int(meshes[0].size()) if meshes else None


def _has(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _check_equal(ours: list[Any], theirs: list[Any]) -> None:
    if ours != theirs:
        mine, their = next(
            pair for pair in itertools.zip_longest(ours, theirs, fillvalue="nothing") if pair[0] != pair[1]
        )
        raise RankError(f"the ranks have different models: {mine} here, {their} on rank 0")
