"""Checkpoints: folders that are whole or not there, and that are checked before anything of them is used.

::

    FOLDER/window-00000120/model.safetensors   the weights and buffers
                           training.pt         what else a run needs, for ``torch.load(..., weights_only=True)``
                           manifest.json       sizes and hashes of both, the model's shapes, the versions

A checkpoint is written under another name and renamed when it is on disk, so the last good one is there whenever the
process is killed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autobatch import __version__
from autobatch.errors import AutobatchWarning, CheckpointError

FORMAT = 1
WEIGHTS, REST, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
_NAME = re.compile(r"window-(\d{8,})(?:\.(\d+))?")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read of a folder, on the host."""

    path: Path
    weights: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """Of what decides the bits of a run."""
    return {"torch": str(torch.__version__), "autobatch": __version__}


def write(folder: Path, window: int, weights: Mapping[str, Any], rest: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of ``window`` and then removes all but the newest ``keep``; returns its folder.

    Args:
        weights: a module's ``state_dict``: tensors, of which some may be tied, and anything else that a module keeps.
        rest: tensors, numbers, text, and lists, tuples and mappings of them.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = _free(folder, f"window-{window:08d}")
    unfinished = folder / f"{_UNFINISHED}{path.name}"
    try:
        _remove(folder.glob(f"{_UNFINISHED}*"))
        unfinished.mkdir(parents=True)
        tensors, ties = _untied(weights)
        others = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
        save_file(tensors, unfinished / WEIGHTS)
        torch.save({**rest, "others": others}, unfinished / REST)
        _check_readable(unfinished / REST)
        about = {
            "format": FORMAT,
            "versions": versions(),
            "files": {name: _digest(unfinished / name) for name in (WEIGHTS, REST)},
            "tensors": {name: _kind(value) for name, value in weights.items() if isinstance(value, Tensor)},
            "ties": ties,
        }
        (unfinished / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")
        _sync([*unfinished.iterdir(), unfinished])
        unfinished.rename(path)
        _sync([folder])
    except (OSError, RuntimeError, SafetensorError) as exc:  # a disk that is full is any of them
        said = str(exc).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be written: {said}") from exc
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # there is none where all went well
    try:
        _remove(newest(folder)[keep:])
    except OSError as exc:
        warnings.warn(f"an old checkpoint cannot be removed: {exc}", AutobatchWarning, stacklevel=2)
    return path


def newest(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in _entries(folder)]
    found = [(int(match[1]), int(match[2] or 0), path) for match, path in matches if match]
    return [path for *_, path in sorted(found, reverse=True)]


def read(path: Path) -> Checkpoint:
    """Reads and checks one.

    Raises:
        CheckpointError: if it is not whole, or of another format.
    """
    try:
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: of format {about['format']}, where this version reads {FORMAT}")
        for name, digest in about["files"].items():
            if _digest(path / name) != digest:
                raise CheckpointError(
                    f"{path / name}: not what was written; without this folder, a run goes on from the one before"
                )
        weights = load_file(path / WEIGHTS)
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as exc:
        raise CheckpointError(f"{path}: cannot be read ({type(exc).__name__}: {exc})") from exc
    weights = {**weights, **{name: weights[other] for name, other in about["ties"].items()}, **rest.pop("others")}
    return Checkpoint(path=path, weights=weights, rest=rest, versions=about["versions"])


def check_same(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the first difference, unless ``checkpoint`` is of a model with this ``state``."""
    theirs = {name: _kind(value) for name, value in checkpoint.weights.items() if isinstance(value, Tensor)}
    ours = {name: _kind(value) for name, value in state.items() if isinstance(value, Tensor)}
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            known, here = theirs.get(name, "nothing"), ours.get(name, "nothing")
            raise CheckpointError(f"{checkpoint.path}: of another model: {name} is {known}, and {here} here")


def _untied(weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the host, and which names stand for one that another name has too."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, str(value.device))
        if value.numel() and key in seen:
            ties[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, ties


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_readable(path: Path) -> None:
    """What a scheduler or an optimizer of somebody's own keeps may be nothing that is read without running code."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as exc:
        said = str(exc).partition("\n")[0]
        raise CheckpointError(
            f"{path.name}: the state of the optimizer, the scheduler or a module has more in it than tensors, numbers, "
            f"text and lists of them, and would not be read again: {said}"
        ) from exc


def _sync(paths: Iterable[Path]) -> None:
    """Waits until they are on disk, and folders know their names."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _free(folder: Path, name: str) -> Path:
    """A path for one more checkpoint of a window: before an evaluation and after it, there may be two."""
    numbers = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
    return next(path for number in numbers if not (path := folder / f"{name}{number}").exists())


def _remove(paths: Iterable[Path]) -> None:
    """By another name first: a folder that is half removed must not look like a checkpoint."""
    for path in paths:
        doomed = path.with_name(f"{_UNFINISHED}{path.name.removeprefix(_UNFINISHED)}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
