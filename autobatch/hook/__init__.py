"""What runs at the start of every Python process of a command that is not ours to edit.

:data:`START` comes first on ``PYTHONPATH`` and holds nothing but a ``sitecustomize``, which the interpreter imports by
itself; it does what the environment variables below ask for. Everything here uses the standard library alone, for it
runs in whatever interpreter the command is of. The modules of autobatch that it loads, by their files, do so too:
``device/cuda_history``, ``device/host_history``, ``device/oom`` and ``device/process``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

START = Path(__file__).with_name("start")
REPORTS_VARIABLE = "AUTOBATCH_RUN_REPORTS"
"""Names a folder: each process writes there at its end what its torch used (:mod:`autobatch.hook.usage`)."""
TRIAL_VARIABLE = "AUTOBATCH_TRIAL"
"""Names a folder: each process is part of the trial that is described there (:mod:`autobatch.hook.trial`)."""


def python_path(base: Mapping[str, str]) -> str:
    """``PYTHONPATH`` of ``base`` with the hook in front."""
    theirs = base.get("PYTHONPATH")
    return f"{START}{os.pathsep}{theirs}" if theirs else str(START)
