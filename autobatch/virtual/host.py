"""Whether this machine and its torch can have a virtual GPU. Reads files only: torch is not imported."""

from __future__ import annotations

import functools
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from autobatch.errors import DeviceNotFoundError
from autobatch.virtual.catalog import Card

_MACHINES = ("x86_64", "aarch64")
_OLDEST_CAPABILITY = (7, 5)  # CUDA 13 compiles for nothing older


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """What the installed torch was built for."""

    version: str
    cuda: str | None
    """The version of CUDA, such as ``13.0``; None for a build without."""


@functools.cache
def torch_build() -> TorchBuild:
    """The installed torch, from the file in which it records its build.

    Raises:
        DeviceNotFoundError: if torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DeviceNotFoundError(
            "a virtual GPU is PyTorch's own CUDA build, and torch is not installed: pip install torch"
        )
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE)
    return TorchBuild(version=version[1] if version else "unknown", cuda=cuda[1] if cuda else None)


def check_host() -> None:
    """Says at once what is missing here.

    Raises:
        DeviceNotFoundError: on another platform than Linux on x86-64 or aarch64, or without a CUDA build of torch.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise DeviceNotFoundError(
            f"a virtual GPU needs Linux on x86-64 or aarch64, and this is {platform.system()} on {platform.machine()}: "
            "run autobatch in a Linux container, or in WSL on Windows"
        )
    build = torch_build()
    if build.cuda is None:
        raise DeviceNotFoundError(
            f"a virtual GPU is PyTorch's own CUDA build, and torch {build.version} is built without CUDA: "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )


def check_kernels(card: Card) -> None:
    """Refuses a card on which this torch could compute nothing, because its build has no kernels for it.

    Raises:
        DeviceNotFoundError: below compute capability 7.5, which CUDA 13 no longer compiles for.
    """
    if card.capability < _OLDEST_CAPABILITY:
        build = torch_build()
        raise DeviceNotFoundError(
            f"{card.title} has compute capability {card.capability[0]}.{card.capability[1]}, and torch {build.version} "
            f"(CUDA {build.cuda}) has no kernels below 7.5: training would fail there. "
            "For the arithmetic of its memory alone, say any_capability=True (--any-capability)"
        )
