"""Starts what autobatch wants of this process, then the ``sitecustomize`` that it stands in front of.

The interpreter imports this module at start-up. It must cost nothing where torch is not used and must hide nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _start(name: str) -> None:
    """Runs ``start()`` of the module beside this folder, loaded by its path: no package of ours need be installed."""
    path = os.path.join(os.path.dirname(_HERE), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_autobatch_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.start()


def _run_hidden() -> None:
    others = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if "AUTOBATCH_RUN_REPORTS" in os.environ:
    _start("usage")
if "AUTOBATCH_TRIAL" in os.environ:
    _start("trial")
_run_hidden()
