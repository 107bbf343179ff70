"""What a run may be given: wrong arguments are named before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search_arguments import check_count


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
