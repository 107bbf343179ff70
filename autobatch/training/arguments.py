"""What a run may be given: wrong arguments are named before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autobatch.errors import InvalidArgumentError
from autobatch.probe.finder import find
from autobatch.probe.search.arguments import check_count


def check_run(*, counts: Mapping[str, Any], numbers: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError for the first that is wrong.

    Args:
        counts: whole numbers of at least 1, or None.
        numbers: whole numbers of at least 0.
        flags: True or False.
    """
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidArgumentError(name, value, "a whole number from 0 on")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidArgumentError(name, value, "True or False")


def check_folder(checkpoint: Any, checkpoint_every: Any) -> None:
    """Raises InvalidArgumentError unless ``checkpoint`` may be a folder, and is given where something needs it."""
    if checkpoint is not None and not isinstance(checkpoint, (str, Path)):
        raise InvalidArgumentError("checkpoint", checkpoint, "a folder, or None")
    if checkpoint is None and checkpoint_every is not None:
        raise InvalidArgumentError("checkpoint_every", checkpoint_every, "left out unless checkpoint names a folder")


def check_find_options(options: Any) -> None:
    """Raises InvalidArgumentError unless ``options`` are arguments of ``find`` that a run leaves open."""
    own = {"workload", "device", "state", "on_trial"}
    known = sorted(set(inspect.signature(find).parameters) - own)
    if options is not None and not isinstance(options, Mapping):
        raise InvalidArgumentError("find_options", options, "a dict of arguments of autobatch.find, or None")
    for name in options or {}:
        if name not in known:
            raise InvalidArgumentError("find_options", f"with {name!r}", f"a dict with {', '.join(known)}")


def check_extra_state(extra_state: Any) -> None:
    """Raises InvalidArgumentError unless ``extra_state`` are objects that a checkpoint can hold, by name."""
    if extra_state is not None and not isinstance(extra_state, Mapping):
        raise InvalidArgumentError("extra_state", extra_state, "a dict of objects by name, or None")
    for name, item in (extra_state or {}).items():
        if not hasattr(item, "state_dict") or not hasattr(item, "load_state_dict"):
            allowed = "objects with state_dict() and load_state_dict()"
            raise InvalidArgumentError(f"extra_state[{name!r}]", type(item).__name__, allowed)
        if name in ("scheduler", "scaler", "loss_fn"):
            raise InvalidArgumentError("extra_state", name, "another name: the run has a part of this one")


def check_probed(model: Any, micro_batch_size: Any) -> bool:
    """Whether the model is whole on each rank; raises InvalidArgumentError for a micro-batch that cannot be probed."""
    is_whole = isinstance(model, nn.Module) and not any(hasattr(p, "device_mesh") for p in model.parameters())
    if micro_batch_size == "auto" and not is_whole:
        allowed = "a number where the model is sharded: find() of a function that builds it tells it"
        raise InvalidArgumentError("micro_batch_size", "auto", allowed)
    return is_whole


def check_alike(told: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Raises InvalidArgumentError for an argument that is not the same on all ranks, which have ``told`` theirs."""
    for name, value in told[rank].items():
        values = [other[name] for other in told]
        if any(other != value for other in values):
            allowed = f"the same on all ranks, which have {', '.join(map(repr, values))}"
            raise InvalidArgumentError(name, value, allowed)
