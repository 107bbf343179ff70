"""Whether this machine and its torch can have a virtual GPU. Reads files only: torch is not imported."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import DeviceNotFoundError

if TYPE_CHECKING:
    from autobatch.virtual.catalog import Card

_MACHINES = ("x86_64", "aarch64")
_NEEDED_HEADERS = ("cuda.h", "cudnn.h", "nccl.h")
_HEADER_PACKAGES = ("cu13", "cudnn", "nccl", "cusparselt")
_OLDEST_CAPABILITY = (7, 5)  # CUDA 13 compiles for nothing older
_TOO_NEW_CAPABILITY = (13, 0)  # torch 2.14.1+cu130 names sm_120 last (torch._C._cuda_getArchFlags), without PTX

_NEWEST_TESTED = (2, 14)


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch, as far as it can be known without importing it."""

    version: str
    cuda: str
    """The version of CUDA it was built for, such as ``13.0``."""
    includes: tuple[Path, ...]
    """Folders of NVIDIA's headers that were installed with it."""


def check_host() -> Torch:
    """The torch for a virtual GPU, where there can be one.

    Raises:
        DeviceNotFoundError: saying what to install, on another platform than Linux on x86-64 or ARM, or without a
            CUDA 13 build of torch and NVIDIA's headers.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise DeviceNotFoundError(
            f"virtual GPUs need Linux on x86-64 or ARM (aarch64), and this is {platform.system()} on "
            f"{platform.machine()}: use a container, or WSL on Windows"
        )
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise DeviceNotFoundError("virtual GPUs need torch: install torch>=2.11 from PyPI, its CUDA 13 build")
    return _torch_at(Path(spec.submodule_search_locations[0]))


def untested_torch() -> str | None:
    """What to say of a torch newer than any that the tests ran on; None for the others."""
    version = check_host().version
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) <= _NEWEST_TESTED:
        return None
    tested = ".".join(map(str, _NEWEST_TESTED))
    return f"virtual GPUs were tested with torch up to {tested}, and this is {version}: its figures may be others"


def check_kernels(card: Card) -> None:
    """Refuses a card on which this torch could compute nothing, because its build has no kernels for it.

    Raises:
        DeviceNotFoundError: below compute capability 7.5, which CUDA 13 no longer compiles for, and from 13 on.
    """
    if not _OLDEST_CAPABILITY <= card.capability < _TOO_NEW_CAPABILITY:
        torch = check_host()
        which = "below 7.5" if card.capability < _OLDEST_CAPABILITY else "from 13.0 on"
        raise DeviceNotFoundError(
            f"{card.title} has compute capability {card.capability[0]}.{card.capability[1]}, and torch {torch.version} "
            f"(CUDA {torch.cuda}) has no kernels {which}: training would fail there. "
            "For the arithmetic of its memory alone, say any_capability=True (--any-capability)"
        )


def _torch_at(place: Path) -> Torch:
    about = place / "version.py"
    text = about.read_text(encoding="utf-8") if about.exists() else ""
    version, cuda = _assigned("__version__", text) or "unknown", _assigned("cuda", text)
    if cuda is None or not cuda.startswith("13."):
        kind = f"for CUDA {cuda}" if cuda else "without CUDA"
        raise DeviceNotFoundError(
            f"virtual GPUs need torch built for CUDA 13, and torch {version} is built {kind}: "
            "pip install torch>=2.11 as it comes from PyPI, on a machine without a GPU too"
        )
    includes = tuple(_find_includes(place.parent))
    missing = [name for name in _NEEDED_HEADERS if not any((path / name).exists() for path in includes)]
    if missing:
        raise DeviceNotFoundError(
            f"torch {version} is installed without NVIDIA's headers ({', '.join(missing)}): "
            "install torch from PyPI with the nvidia-* packages it depends on"
        )
    return Torch(version, cuda, includes)


def _assigned(name: str, text: str) -> str | None:
    match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _find_includes(site: Path) -> Iterator[Path]:
    """NVIDIA's packages beside torch each bring a folder of headers."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for root in dict.fromkeys([site / "nvidia", *roots]):
        for package in _HEADER_PACKAGES:
            if (root / package / "include").is_dir():
                yield root / package / "include"
