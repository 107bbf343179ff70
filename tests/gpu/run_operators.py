"""Runs torch's operator database on the device "cuda": ``python run_operators.py OUT.json [NAME...]``.

Up to six samples of each operator, with their backward. A worker process goes through the database; one that crashes
or hangs costs the operator it was at, and another goes on with the next. ``OUT.json`` maps each operator to "ok" or to
what went wrong first.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

SAMPLES = 6
LIMIT_S = 60


def database(names: list[str]) -> dict[str, Any]:
    """The entries of torch's database, by name and variant."""
    try:
        import expecttest  # noqa: F401
    except ImportError:  # it comes with torch's test cases, which have a base class from there
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    from torch.testing._internal.common_methods_invocations import op_db

    entries = {o.name + (f".{o.variant_test_name}" if o.variant_test_name else ""): o for o in op_db}
    return {name: entry for name, entry in entries.items() if not names or entry.name in names or name in names}


def run(operator: Any) -> None:
    """Raises what the first sample that does not run raises, forward or backward."""
    import torch

    supported = operator.supported_dtypes("cuda")
    dtype = torch.float32 if torch.float32 in supported else min(supported, key=str)
    differentiable = operator.supports_autograd and dtype.is_floating_point
    for number, sample in enumerate(operator.sample_inputs("cuda", dtype, requires_grad=differentiable)):
        if number == SAMPLES:
            break
        output = operator(sample.input, *sample.args, **sample.kwargs)
        if differentiable:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            tensors = [value for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
            if tensors:
                sum(t.abs().sum() if t.is_complex() else t.sum() for t in tensors).backward()
        torch.cuda.synchronize()


def work(names: list[str]) -> None:
    """One line for each operator: its name before it runs, and how it went after that."""
    warnings.filterwarnings("ignore")
    entries = database(names)
    for name in names:
        print(json.dumps([name]), flush=True)
        signal.alarm(LIMIT_S)
        try:
            run(entries[name])
            answer = "ok"
        except Exception as error:  # noqa: BLE001 - whatever an operator raises is its result
            answer = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        print(json.dumps([name, answer[:300]]), flush=True)


def work_through(names: list[str]) -> dict[str, str]:
    """How each operator went, in as many workers as it takes."""
    results: dict[str, str] = {}
    while rest := [name for name in names if name not in results]:
        command = [sys.executable, __file__, "--worker", *rest]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert worker.stdout is not None
        at = rest[0]
        for line in worker.stdout:
            if line.startswith("["):
                at, *answer = json.loads(line)
                results.update({at: answer[0]} if answer else {})
        if worker.wait():
            results[at] = f"the process ended with {worker.returncode}"
    return results


def main(out: Path, names: list[str]) -> None:
    start = time.monotonic()
    results = work_through(list(database(names)))
    out.write_text(json.dumps(results, indent=1))
    good = sum(result == "ok" for result in results.values())
    print(f"{good} of {len(results)} run, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        work(sys.argv[2:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
