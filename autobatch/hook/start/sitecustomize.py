"""Starts what autobatch wants of this process, then the ``sitecustomize`` that it stands in front of.

The interpreter imports this module at start-up. It must cost nothing where torch is not used and must hide nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_AUTOBATCH = os.path.dirname(os.path.dirname(_HERE))


def load(module: str) -> Any:
    """One of autobatch's modules that need the standard library alone, such as ``device/oom``.

    By its path, for no package of ours need be installed; once in a process.
    """
    name = f"_autobatch_{os.path.basename(module)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, os.path.join(_AUTOBATCH, f"{module}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return sys.modules[name]


def _run_hidden() -> None:
    others = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if "AUTOBATCH_RUN_REPORTS" in os.environ:
    load("hook/usage").start(load)
if "AUTOBATCH_TRIAL" in os.environ:
    load("hook/trial").start(load)
_run_hidden()
