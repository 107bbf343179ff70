"""Libraries that are there only where their extra was installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autobatch.errors import MissingDependencyError

_EXTRAS = {"transformers": "hf"}
"""The extra that brings a library, where it has another name."""


@contextmanager
def needed(library: str) -> Iterator[None]:
    """Inside, ``library`` is imported.

    Raises:
        MissingDependencyError: naming the extra to install, if it cannot be.
    """
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as exc:
        extra = _EXTRAS.get(library, library)
        raise MissingDependencyError(
            f"{library} cannot be imported ({exc}): pip install 'autobatch-torch[{extra}]'"
        ) from exc
