"""The gradient noise scale: which batch size the gradients themselves speak for."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from autobatch.errors import AutobatchWarning, InvalidArgumentError
from autobatch.probe.search.arguments import check_count
from autobatch.ranks import Ranks

_STATE = ("decay", "windows", "trace", "square")
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_MOST_WAITING = 64  # windows whose values stay on the device: few, and one wait for it in so many costs nothing
_FIRST = 32  # windows that are all measured: a short run is to have a figure too
_ROUNDING = 0.01  # more than bf16 gradients are rounded by; the parts' squares are below the whole's by no more


class NoiseScale:
    """Measures the gradient noise scale while training, from the micro-batches of each window. It changes nothing.

    It is given to ``Accumulator(..., noise=noise)`` once, and has a :attr:`batch_size` to read at any time.
    The noise scale is tr(S) / |G|^2, where S is the covariance of one loss term's gradient and G its mean. Well below
    it twice the batch takes half the steps; well above it a larger one saves next to none
    (https://arxiv.org/abs/1812.06162, appendix A).

    Of k micro-batches with n_j terms each, N together, E|g_j|^2 = |G|^2 + tr(S)/n_j; of g = sum n_j g_j / N it is
    |G|^2 + tr(S)/N. So tr(S) = (sum n_j |g_j|^2 - N |g|^2) / (k - 1) and |G|^2 = |g|^2 - tr(S)/N are right on average
    for any sizes, if terms are drawn independently. Each is averaged for itself, then they are divided.

    Hooks on the parameters take the norms; sparse gradients are coalesced for it, which waits for a GPU. Left out are
    windows of one micro-batch over all ranks, those where a gradient is not finite, and those where a parameter gets
    its gradient in parts (as tied weights do from re-entrant checkpoints).

    Args:
        decay: of the exponential averages: a window counts that much less with each that follows.
        every: measure one window in so many, once the first 32 are done: a norm of each gradient takes a few per cent
            of a small model's time.

    Raises:
        InvalidArgumentError: if ``decay`` is not a number from 0 on and below 1, or ``every`` no positive whole number.
    """

    # 1812.06162 tunes the decay until estimates are stable, and names none. GPT-NeoX takes 0.99: the last hundred
    # windows, enough for an error of a tenth, and few beside the thousands over which the noise scale itself grows.
    def __init__(self, *, decay: float = 0.99, every: int = 1) -> None:
        if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay < 1:
            raise InvalidArgumentError("decay", decay, "a number from 0 on and below 1")
        check_count("every", every)
        self._every = every
        self._decay, self._windows, self._trace, self._square = float(decay), 0, 0.0, 0.0
        self._handles: list[RemovableHandle] = []
        self._places: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._seen: dict[int, Tensor] | None = None  # norms by parameter; None outside a micro-batch
        self._window: list[tuple[float, Tensor]] = []  # terms and norm of each micro-batch so far
        self._waiting: list[tuple[list[float], Tensor]] = []  # windows whose values are still on the device

    @property
    def batch_size(self) -> float | None:
        """The noise scale in loss terms (samples, or what ``count`` says); None while unknown. Waits for the device."""
        self._settle()
        return max(0.0, self._trace) / self._square if self._square > 0 else None  # a trace is below 0 by rounding

    @property
    def windows(self) -> int:
        """How many windows the noise scale is known from. Waits for the device."""
        self._settle()
        return self._windows

    def is_due(self, window: int) -> bool:
        """Whether ``window``, counted from 0, is one of those that are measured."""
        return window < _FIRST or window % self._every == 0

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Puts a hook on each that requires a gradient, once where it is tied; earlier hooks are taken off.

        Args:
            parameters: all those whose gradients :meth:`finish` is given the norm of.

        Raises:
            InvalidArgumentError: if one is a DTensor: a hook sees the gradient of a shard.
        """
        trained = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}
        if any(hasattr(parameter, "device_mesh") for parameter in trained.values()):  # without importing DTensor
            raise InvalidArgumentError("parameters", "a DTensor", "whole on every rank")
        self.close()
        for key, parameter in trained.items():
            self._handles.append(parameter.register_hook(functools.partial(self._observe, key)))

    def close(self) -> None:
        """Takes the hooks off. What is known stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places = [], {}
        self.drop()

    @contextlib.contextmanager
    def micro_batch(self, *, terms: float, share: float | Tensor) -> Iterator[None]:
        """Observes one backward pass, of ``share`` times the mean loss over ``terms``.

        Args:
            terms: the micro-batch's loss terms.
            share: its part of the window's terms, times a GradScaler's scale. A scalar tensor is not waited for.
        """
        if not self._handles or not terms:
            yield
            return
        self._seen = {}
        try:
            yield
            norms = _together([*self._seen.values()] or [0.0])
        finally:
            self._seen = None
        self._window.append((terms, torch.linalg.vector_norm(norms) / share))

    def drop(self) -> None:
        """Forgets the micro-batches of the current window, which is given up or repeated."""
        self._window = []

    def finish(self, *, grad_norm: float | Tensor, ranks: Ranks) -> None:
        """Ends a window. A collective where there are several ranks; else a device is waited for once in 64 windows.

        Args:
            grad_norm: the norm of the gradient of the mean loss over the terms of all ranks, unscaled and not clipped.
            ranks: those that the window is spread over.

        Raises:
            RankError: if a rank is gone or silent.
        """
        terms = [count for count, _ in self._window]
        norms = _together([*(norm for _, norm in self._window), grad_norm])
        self.drop()
        if ranks.are_several:
            squares, count, parts, square = _sums(terms, norms.tolist())
            # The last is known to all ranks, but for its last digits: its mean is the same in those too.
            self._add(*ranks.sums([squares, count, parts, square / ranks.size]))
        elif len(terms) > 1:
            self._waiting.append((terms, norms))
            if len(self._waiting) >= _MOST_WAITING:
                self._settle()

    def state_dict(self) -> dict[str, float]:
        """The averages as plain numbers, for a checkpoint between two windows."""
        self._settle()
        return dict(zip(_STATE, (self._decay, self._windows, self._trace, self._square), strict=True))

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Goes on from what :meth:`state_dict` gave, its decay included; hooks stay as they are.

        Raises:
            InvalidArgumentError: if it is something else; nothing is changed then.
        """
        try:
            decay, windows, trace, square = (float(state_dict[name]) for name in _STATE)
        except (KeyError, TypeError, ValueError) as exc:
            raise InvalidArgumentError("state_dict", state_dict, "what NoiseScale.state_dict() gave") from exc
        self.drop()
        self._waiting = []
        self._decay, self._windows, self._trace, self._square = decay, int(windows), trace, square

    def _observe(self, key: int, gradient: Tensor) -> None:
        if self._seen is None:
            return
        if gradient.requires_grad:  # under create_graph, where a norm would keep the graph
            gradient = gradient.detach()
        if gradient.layout is not torch.strided:  # a sparse gradient may have several values for one place
            gradient = (gradient.coalesce() if gradient.layout is torch.sparse_coo else gradient).values()
        # One at a time: a gradient that is kept until all are there cannot become the parameter's own, and is copied.
        # Each norm has its place: small tensors that come and go between the large ones would break up the heap.
        place, dtype = (key, gradient.device, gradient.dtype), _WIDER.get(gradient.dtype)
        norm = torch.linalg.vector_norm(gradient, dtype=dtype, out=self._places.get(place))
        self._places[place] = norm
        self._seen[key] = norm.fill_(math.nan) if key in self._seen else norm

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for terms, norms in waiting:
            self._add(*_sums(terms, norms.tolist()))

    def _add(self, squares: float, count: float, parts: float, square: float) -> None:
        if parts < 2 or not math.isfinite(squares + square):
            return
        if squares < (1 - _ROUNDING) * count * square:
            said = "no noise scale from windows whose gradient is larger than what hooks on the parameters saw of it"
            return warnings.warn(said, AutobatchWarning, stacklevel=3)
        trace = (squares - count * square) / (parts - 1)
        self._windows += 1
        # So the average is debiased as it is: the first window counts in full.
        weight = (1 - self._decay) / (1 - self._decay**self._windows)
        self._trace += weight * (trace - self._trace)
        self._square += weight * (square - trace / count - self._square)


def _together(scalars: Sequence[float | Tensor]) -> Tensor:
    tensors = [scalar.detach() if isinstance(scalar, Tensor) else torch.tensor(scalar) for scalar in scalars]
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])


def _sums(terms: Sequence[float], norms: Sequence[float]) -> tuple[float, float, float, float]:
    """Of a window: sum n_j |g_j|^2, N, k and |g|^2, from the norms of its parts and of the whole."""
    *parts, whole = (norm * norm for norm in norms)
    return sum(n * square for n, square in zip(terms, parts, strict=True)), sum(terms), len(terms), whole
