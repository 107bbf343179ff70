"""A first guess for a real GPU, from a virtual one of the same size.

The virtual GPU is in a child process, which never touches the real one: there the driver's library is ours. Its answer
is where the search on the real GPU begins; a wrong one costs trials, never correctness.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from autobatch.device import nvml
from autobatch.device.base import Device
from autobatch.errors import AutobatchError, AutobatchWarning
from autobatch.probe.command import Command
from autobatch.probe.command.executor import CommandExecutor
from autobatch.probe.executor import Executor, Setting
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes.ahead import begun
from autobatch.probe.processes.job import is_importable
from autobatch.probe.source import Source, builder_of
from autobatch.virtual.attach import present_state
from autobatch.virtual.catalog import cards
from autobatch.virtual.device import VirtualGPU
from autobatch.virtual.host import check_host

SHORT = 0.97
"""The part of a virtual GPU's answer that a real one is asked for where nothing may fail."""

WITHIN_S = 60.0
"""A guess that takes longer saves nothing: most real searches are over by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What a virtual GPU answers."""

    batch_size: int
    smallest: int
    """The smallest batch that ran there."""


def short_of(guess: int, environment: Mapping[str, Any]) -> int:
    """Where to begin if nothing may fail and a virtual GPU says that ``guess`` fits: below it, unless the device is
    virtual as well.
    """
    return guess if environment["virtual"] else max(1, int(SHORT * guess))


def twin_of(setting: Setting, *, of_virtual: bool = False) -> str | None:
    """A virtual card with the budget and the capability of ``setting``, that of an NVIDIA GPU.

    By what the process of the trials has told: to ask the device here would put a context on it, at the trials' cost.

    None where there cannot be one: for another device, or on a machine without virtual GPUs.

    Args:
        of_virtual: also if the GPU is virtual itself, which is quicker to try than another, unless it must not fail.
    """
    known = setting.environment
    if known["kind"] != "cuda" or (known["virtual"] and not of_virtual):
        return None
    if not known["capability"] or not setting.budget_bytes:
        return None
    try:
        check_host()
    except AutobatchError:
        return None
    multiprocessors = known["details"].get("multiprocessors")
    sms = f",sms={multiprocessors}" if multiprocessors else ""
    return f"memory={setting.budget_bytes}B,capability={known['capability']},outside=0{sms}"


class Twin:
    """A virtual GPU on which ``executor`` tries a workload instead, None if it cannot be had there.

    Args:
        card: as ``autobatch run --gpu`` takes it.
    """

    def __init__(self, source: Source, card: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AutobatchWarning)  # it gives a first guess, no answer
            self.device = VirtualGPU(card, any_capability=True)  # as long as it is there, so is the card
        self.executor = _there(source, self.device)
        self._ahead = ExitStack()

    def begin(self) -> None:
        """From now on the process of its trials imports torch, if they need one."""
        if self.executor is not None:
            self._ahead.enter_context(begun(self.device.isolation()))

    def stands_for(self, setting: Setting) -> bool:
        """Whether trials here can say what those in ``setting`` may have: the card has its kernels, and the memory."""
        known, card = setting.environment, self.device.card
        kernels = (known["capability"], known["details"].get("multiprocessors"))
        are_same = kernels == (".".join(map(str, card.capability)), str(card.multiprocessors))
        return are_same and (setting.budget_bytes or 0) <= card.total_bytes

    def close(self) -> None:
        """Ends the processes of the trials."""
        try:
            if self.executor is not None:
                self.executor.close()
        finally:
            self._ahead.close()


@contextmanager
def twin_ahead(source: Source, device: Device) -> Iterator[Twin | None]:
    """The twin of a real GPU, by what its name tells before anybody has touched it: the process there imports torch
    while that of the real one does. None where the name does not tell enough, or where there is nothing to import.
    """
    with ExitStack() as stack:
        twin = None
        try:
            if not isinstance(source, Command) and (card := _card_ahead(device)) is not None:
                twin = stack.enter_context(closing(Twin(source, card)))
                twin.begin()
        except Exception:  # noqa: BLE001 - a twin that cannot be had ahead is asked for later, and tells why
            twin = None
        yield twin


def _card_ahead(device: Device) -> str | None:
    kind, _, index = device.torch_device.partition(":")
    if kind != "cuda" or device.isolation().required or present_state() is not None:
        return None
    check_host()
    for gpu in nvml.list_gpus():
        if gpu.index == int(index) and gpu.total_bytes:
            figures = {(card.capability, card.multiprocessors) for card in cards() if card.title == gpu.name}
            if len(figures) == 1:
                ((major, minor), sms) = figures.pop()
                return f"memory={gpu.total_bytes}B,capability={major}.{minor},outside=0,sms={sms}"
    return None


def virtual_guess(
    source: Source, card: str, search: Callable[[Executor], Guess], ahead: Twin | None = None
) -> tuple[Guess | None, str]:
    """What ``search`` answers on the virtual ``card``, and a sentence about it. None if it comes to no answer, and no
    sentence if ``source`` cannot be had in another process.

    Whatever goes wrong there is no error of the caller's: the real GPU has the last word.

    Args:
        ahead: a twin that will do as well.
    """
    try:
        with closing(ahead or Twin(source, card)) as twin:
            if twin.executor is None:
                return None, ""
            guess = search(twin.executor)
    except Exception as exc:  # noqa: BLE001 - a workload may fail in any way where all values are zero
        return None, f"A virtual GPU could not be asked for a first guess ({type(exc).__name__})."
    return guess, f"A virtual GPU of the same size answers {guess.batch_size}: the search began from there."


def _there(source: Source, device: VirtualGPU) -> Executor | None:
    if isinstance(source, Command):
        return CommandExecutor(source, device)
    builder = builder_of(source)
    if builder is None or not is_importable(builder):
        return None
    return ChildExecutor(builder, device.isolation())
