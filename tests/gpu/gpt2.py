"""GPT-2 as libraries that train have it: whole, and small enough for each test run."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest

SIZES = ["small", pytest.param("whole", marks=pytest.mark.slow)]
_OPTIONS = {"small": {"n_layer": 2, "n_embd": 256, "n_head": 4}, "whole": {}}


def gpt2(size: str) -> Any:
    """The small one has all the words, whose scores take most of the memory of a sample, and little else."""
    config, model = _classes()
    return model(config(use_cache=False, **_OPTIONS[size]))


@functools.cache
def _classes() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    found = transformers.GPT2Config, transformers.GPT2LMHeadModel
    # Every trial collects garbage, and what that has imported only now is large and none.
    gc.collect()
    gc.freeze()
    return found
