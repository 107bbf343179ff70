"""A machine of virtual GPUs for one test, and programs that run on it in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from autobatch.units import GIB
from autobatch.virtual.attach import environment
from autobatch.virtual.build import driver_folder, read_answers, read_calls
from autobatch.virtual.catalog import Card
from autobatch.virtual.state import create_state, read_state


def ooms() -> int:
    """Out-of-memory errors of this process so far."""
    import torch  # not before a virtual GPU is attached

    return int(torch.cuda.memory_stats()["num_ooms"])


def in_new_process(code: str) -> str:
    """What ``code`` prints as a program on the session's GPU, where nothing was before. Fails with its own words."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Machine:
    def __init__(
        self,
        folder: Path,
        *,
        cards=1,
        total_bytes=8 * GIB,
        outside_bytes=0,
        capability=(8, 0),
        multiprocessors=108,
        fail=None,
    ):
        self.path, self.counts = folder / "state", folder / "calls"
        card = Card(
            name="test",
            title="Test GPU",
            total_bytes=total_bytes,
            outside_bytes=outside_bytes,
            capability=capability,
            multiprocessors=multiprocessors,
            sources={},
        )
        create_state(self.path, [card] * cards, fail_allocation=fail)

    def environment(self, **variables: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        ours = environment(self.path, clean) | {"AUTOBATCH_VIRTUAL_CALLS": str(self.counts)}
        return clean | ours | variables

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            env=self.environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, timeout_s: float = 250, **variables: str) -> str:
        """What the command prints. Fails with its own words if it fails."""
        with self.start(*command, **variables) as process:
            out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, err[-3000:]
        return out

    def fails(self, *command: str, **variables: str) -> str:
        """The standard error of a command that must fail, and not by a signal."""
        with self.start(*command, **variables) as process:
            _, err = process.communicate(timeout=250)
        assert process.returncode > 0, (process.returncode, err[-3000:])
        return err

    def state(self):
        return read_state(self.path)

    def unwritten_answers(self) -> dict[str, list[str]]:
        """Generated answers that were used although the real function gives something back through a pointer."""
        folder = driver_folder()
        answers = read_answers(folder)
        used = read_calls(folder, self.counts)
        assert used, "nothing was counted"
        return {name: answers[name] for name in used if answers[name]}
