"""Everything a trial changes, put back bit for bit.

The copy lives in host memory, so that it costs none of the memory being measured. Restoring writes in place: a
tensor keeps its identity, so an optimizer's references, tied weights and views go on holding.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.probe.random_numbers import random_states

Restore = Callable[[], object]
_CUDNN_FLAGS = ("benchmark", "deterministic", "enabled")


@contextlib.contextmanager
def preserved(objects: Iterable[Any], torch_device: str) -> Iterator[Restore]:
    """Inside, ``objects`` and the global state that training touches may change; on leaving, all is as it was.

    ``objects`` are modules, optimizers, schedulers, scalers, generators, tensors, containers of these, or anything
    with ``state_dict`` and ``load_state_dict``. It is put back on success, on an error and on Ctrl-C; a Ctrl-C during
    the restoring itself waits until that is done. Gives a function that puts it all back before that, as often as
    it is called.
    """
    memento = Memento()
    restores = [memento.capture(item) for item in objects]
    restores += _global_state(torch_device)

    def restore_all() -> None:
        with interrupts_deferred():
            _run(restores)

    try:
        yield restore_all
    finally:
        restore_all()


def fingerprint(*objects: Any, torch_device: str = "cpu") -> str:
    """A hash over every bit that :func:`preserved` would put back: equal before and after is what it promises."""
    digest = hashlib.sha256()
    _Fingerprint(digest.update).visit((objects, [getattr(torch.backends.cudnn, flag) for flag in _CUDNN_FLAGS]))
    digest.update(repr((torch.is_grad_enabled(), torch.get_default_dtype())).encode())
    for _, state in random_states(torch_device):
        # An array's repr leaves most of it out.
        parts = [part.tolist() if hasattr(part, "tolist") else part for part in state]
        digest.update(repr(parts).encode())
    return digest.hexdigest()


class Memento:
    """Captures objects and whatever hangs from them, each once however often it is reached (tied weights are)."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # id -> the object, kept alive so that no id is used twice
        self._storages: set[int] = set()

    def capture(self, item: Any) -> Restore:
        """A function that puts ``item`` back to what it is now. Immutable values need none: their holder keeps them."""
        if id(item) in self._seen:
            return _nothing
        capture = self._method(item)
        if capture is None:
            return _nothing
        self._seen[id(item)] = item
        return capture(item)

    def _method(self, item: Any) -> Callable[[Any], Restore] | None:
        if isinstance(item, Tensor):
            return self._tensor
        if isinstance(item, MutableMapping):
            return self._mapping
        if isinstance(item, (list, collections.deque)):
            return self._sequence
        if isinstance(item, tuple):
            return self._tuple
        if isinstance(item, set):
            return self._set
        if isinstance(item, (torch.Generator, random.Random)) or _is_numpy_generator(item):
            return _generator
        if _is_open(item):
            return self._attributes
        # A model may hold the class of its layers, which is nothing to save: torchvision's ResNet does.
        if not isinstance(item, type) and hasattr(item, "state_dict") and hasattr(item, "load_state_dict"):
            return _by_state_dict
        return None

    def _tensor(self, tensor: Tensor) -> Restore:
        alias = tensor.detach()  # holds the storage, should the trial give the tensor another one
        contents = self._storage(alias)
        grad, requires_grad = tensor.grad if tensor.is_leaf else None, tensor.requires_grad
        restore_grad = self.capture(grad)

        def restore() -> None:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
                tensor.data = alias
            contents()
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
                tensor.grad = grad
                restore_grad()

        return restore

    def _storage(self, alias: Tensor) -> Restore:
        # Bytes of the storage, not values of the view: any dtype, any strides, shared memory once.
        storage = alias.untyped_storage()
        if storage.data_ptr() in self._storages or storage.nbytes() == 0:
            return _nothing
        self._storages.add(storage.data_ptr())
        saved = torch.UntypedStorage(storage.nbytes())
        saved.copy_(storage)
        return lambda: storage.copy_(saved)

    def _mapping(self, mapping: MutableMapping[Any, Any]) -> Restore:
        items = list(mapping.items())
        restores = [self.capture(value) for _, value in items]

        def restore() -> None:
            if list(map(id, mapping.values())) != [id(v) for _, v in items] or list(mapping) != [k for k, _ in items]:
                mapping.clear()
                mapping.update(items)
            _run(restores)

        return restore

    def _sequence(self, sequence: list[Any] | collections.deque[Any]) -> Restore:
        items = list(sequence)
        restores = [self.capture(value) for value in items]

        def restore() -> None:
            sequence.clear()
            sequence.extend(items)
            _run(restores)

        return restore

    def _tuple(self, items: tuple[Any, ...]) -> Restore:
        restores = [self.capture(value) for value in items]
        return lambda: _run(restores)

    def _set(self, items: set[Any]) -> Restore:
        saved = set(items)

        def restore() -> None:
            items.clear()
            items.update(saved)

        return restore

    def _attributes(self, item: Any) -> Restore:
        return self._mapping(vars(item))


class _Fingerprint:
    """Feeds everything :class:`Memento` would capture to a hash, in a fixed order."""

    def __init__(self, update: Callable[[bytes], None]) -> None:
        self._update, self._numbers = update, dict[int, int]()
        self._alive: list[Any] = []  # so that no id is used twice

    def visit(self, item: Any) -> None:
        if isinstance(item, (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, complex)):
            self._update(repr(item).encode())
        elif id(item) in self._numbers:
            self._update(b"again %d" % self._numbers[id(item)])
        else:
            self._numbers[id(item)] = len(self._numbers)
            self._alive.append(item)
            self._update(type(item).__qualname__.encode())
            self._contents(item)

    def _contents(self, item: Any) -> None:
        if isinstance(item, Tensor):
            self._tensor(item)
        elif isinstance(item, MutableMapping):
            for key, value in item.items():
                self.visit(key)
                self.visit(value)
        elif isinstance(item, (list, tuple, collections.deque)):
            for value in item:
                self.visit(value)
        else:
            self.visit(_told_state(item))

    def _tensor(self, item: Tensor) -> None:
        values = item.detach().cpu().contiguous()
        self._update(repr((item.shape, item.dtype, str(item.device), item.requires_grad)).encode())
        self._update(values.flatten().view(torch.uint8).numpy().tobytes() if values.numel() else b"")
        if item.is_leaf:
            self.visit(item.grad)


def _told_state(item: Any) -> Any:
    """The state of ``item`` in plainer objects; None if it has none to tell."""
    if isinstance(item, type):  # a model may hold the class of its layers, or torch.Tensor
        return None
    if isinstance(item, set):
        return sorted(map(repr, item))
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, random.Random):
        return item.getstate()
    if _is_numpy_generator(item):
        return item.bit_generator.state if hasattr(item, "bit_generator") else item.get_state()
    if hasattr(item, "tolist"):  # an array of numpy's
        return item.tolist()
    if _is_open(item):
        return vars(item)
    return item.state_dict() if hasattr(item, "state_dict") else None


def _is_open(item: Any) -> bool:
    """True for the kinds whose attributes are their state, all of which we may put back."""
    kinds = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    return isinstance(item, kinds)


def _is_numpy_generator(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, (numpy.random.Generator, numpy.random.RandomState))


def _generator(item: Any) -> Restore:
    if isinstance(item, torch.Generator):
        state = item.get_state()
        return lambda: item.set_state(state)
    if isinstance(item, random.Random):
        return _setter(item.setstate, item.getstate())
    if hasattr(item, "bit_generator"):
        return _attribute_setter(item.bit_generator, "state", copy.deepcopy(item.bit_generator.state))
    return _setter(item.set_state, item.get_state())


def _by_state_dict(item: Any) -> Restore:
    saved = copy.deepcopy(item.state_dict())
    return lambda: item.load_state_dict(saved)


def _global_state(torch_device: str) -> list[Restore]:
    """Random number generators, and the switches of torch that training code turns."""
    restores = [_setter(put_back, state) for put_back, state in random_states(torch_device)]
    for flag in _CUDNN_FLAGS:
        restores.append(_attribute_setter(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag)))
    restores.append(_setter(torch.set_grad_enabled, torch.is_grad_enabled()))
    restores.append(_setter(torch.set_default_dtype, torch.get_default_dtype()))
    return restores


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is done. Only the main thread receives any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[-1])


def _run(restores: list[Restore]) -> None:
    for restore in restores:
        restore()


def _nothing() -> None:
    """What an object without state of its own needs."""


def _setter(function: Callable[[Any], Any], value: Any) -> Restore:
    return lambda: function(value)


def _attribute_setter(holder: Any, name: str, value: Any) -> Restore:
    return lambda: setattr(holder, name, value)
