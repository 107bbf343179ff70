"""The learning rate of another batch size, on request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from autobatch.errors import InvalidArgumentError

RULES = ("auto", "linear", "sqrt")
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group; OneCycleLR has its rates there, and these are all
_ATTRIBUTES = ("base_lrs", "max_lrs", "_last_lr")  # of a scheduler: CyclicLR's top, and what get_last_lr() answers


def scale_lr(
    optimizer: Any,
    reference: float,
    new: float,
    *,
    rule: str = "auto",
    noise_scale: float | None = None,
    scheduler: LRScheduler | None = None,
) -> float:
    """Multiplies the learning rates of ``optimizer`` by what a change of the effective batch size asks for.

    ::

        factor = autobatch.scale_lr(optimizer, 256, 1024, noise_scale=noise.batch_size)

    With s = new / reference the factor is s by the linear rule, for SGD (https://arxiv.org/abs/1706.02677), and the
    square root of s for the Adam family (https://arxiv.org/abs/2205.10287). The second paper changes Adam's betas and
    eps too; here they stay. Both rules hold while noise outweighs the gradient. ``noise_scale`` B says how far that
    is: a larger batch's factor is at most (B/reference + 1) / (B/new + 1), the gain of
    https://arxiv.org/abs/1812.06162. A smaller batch's is the rule's.

    Changed are ``lr`` and ``initial_lr`` of every parameter group, tensors in place, ``max_lr`` and ``min_lr`` where
    OneCycleLR has put them there, and the default of groups yet to come. Any other scheduler that is there already
    keeps rates of its own and goes back to them: give it too, or make it afterwards. Its floors (``eta_min``,
    ``min_lrs``) stay.

    Args:
        optimizer: of torch, or with ``param_groups`` as torch's are.
        reference: the effective batch size that the learning rate was chosen for.
        new: the one that is trained with, in the same unit.
        rule: ``"linear"``, ``"sqrt"``, or ``"auto"`` by the optimizer's class and those that it derives from.
        noise_scale: of :class:`~autobatch.NoiseScale`, in that unit too; None for no limit.
        scheduler: that of the optimizer, whose base rates are changed with it.

    Returns:
        The factor.

    Raises:
        InvalidArgumentError: if an argument is wrong, or no rule is known for the optimizer; nothing is changed then.
    """
    groups = _groups_of(optimizer)
    factor = _factor(_rule_of(optimizer, rule), reference, new, noise_scale)
    schedulers = [] if scheduler is None else list(_schedulers_of(scheduler, groups))
    done: set[int] = set()
    for group in [*groups, getattr(optimizer, "defaults", {})]:
        group.update({key: _scaled(group[key], factor, done) for key in _KEYS if _is_rate(group.get(key))})
    for part in schedulers:
        for key in _ATTRIBUTES:
            if hasattr(part, key):
                setattr(part, key, [_scaled(rate, factor, done) for rate in getattr(part, key)])
    return factor


def _factor(rule: str, reference: float, new: float, noise_scale: float | None) -> float:
    for name, size in {"reference": reference, "new": new}.items():
        if not _is_number(size) or not 0 < size < math.inf:
            raise InvalidArgumentError(name, size, "a positive number")
    if noise_scale is not None and (not _is_number(noise_scale) or not 0 <= noise_scale < math.inf):
        raise InvalidArgumentError("noise_scale", noise_scale, "a number from 0 on, or None")
    factor = new / reference if rule == "linear" else math.sqrt(new / reference)
    if noise_scale is None or new <= reference:
        return factor
    return min(factor, (noise_scale / reference + 1) / (noise_scale / new + 1))


def _rule_of(optimizer: Any, rule: str) -> str:
    if rule not in RULES:
        raise InvalidArgumentError("rule", rule, f"one of {', '.join(RULES)}")
    if rule != "auto":
        return rule
    if isinstance(optimizer, torch.optim.SGD):
        return "linear"
    if isinstance(optimizer, _ADAMS):
        return "sqrt"
    allowed = "SGD or of the Adam family with rule='auto'; for others give rule='linear' or rule='sqrt'"
    raise InvalidArgumentError("optimizer", type(optimizer).__name__, allowed)


def _groups_of(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise InvalidArgumentError("optimizer", type(optimizer).__name__, "a torch optimizer")
    for group in groups:
        rates = {"lr": None} | {key: group[key] for key in _KEYS if key in group}
        for key, rate in rates.items():
            if not _is_rate(rate):
                allowed = f"one whose groups have a number, or a floating-point tensor, for {key}"
                raise InvalidArgumentError("optimizer", f"{type(optimizer).__name__} with {key}={rate!r}", allowed)
    return groups


def _schedulers_of(scheduler: Any, groups: list[dict[str, Any]]) -> Iterator[Any]:
    """The scheduler and those that it is made of."""
    if not isinstance(scheduler, LRScheduler):
        raise InvalidArgumentError("scheduler", type(scheduler).__name__, "a torch scheduler, or None")
    if scheduler.optimizer.param_groups is not groups:
        raise InvalidArgumentError("scheduler", f"{type(scheduler).__name__} of another optimizer", "the optimizer's")
    for key in _ATTRIBUTES:
        if not all(_is_rate(rate) for rate in getattr(scheduler, key, ())):
            said = f"{type(scheduler).__name__} with {key}={getattr(scheduler, key)!r}"
            raise InvalidArgumentError("scheduler", said, "one whose rates are numbers, or floating-point tensors")
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _schedulers_of(part, groups)


def _scaled(rate: Any, factor: float, done: set[int]) -> Any:
    if not isinstance(rate, Tensor):
        return rate * factor
    # Groups that took their rate from the optimizer's default all have the same tensor.
    if id(rate) not in done:
        done.add(id(rate))
        with torch.no_grad():
            rate.mul_(factor)
    return rate


def _is_rate(value: object) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
