"""A machine of virtual GPUs for one test, and programs that run on it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
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


FORKING = """
import json, os, signal, sys
exec(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(250)
__file__, arguments, variables, output, errors = json.loads(line)
for number, path in enumerate([os.devnull, output, errors]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
os.environ.update(variables)
sys.argv = [__file__, *arguments]
with open(__file__) as file:
    code = compile(file.read(), __file__, "exec")
exec(code)
sys.stdout.flush()
os._exit(0)  # to take all that was imported apart is a second's work; whoever wants that raises SystemExit
"""


class Forks:
    """Programs as forks of a process that has run ``beginning`` and no more.

    Importing torch takes seconds, and while no GPU was used, forks are as good as processes of their own: each has the
    GPUs that its own variables name.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str], beginning: str = "import torch") -> None:
        self._folder, self._variables, self._beginning = folder, dict(variables), beginning
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str, **variables: str) -> str:
        """What ``code`` prints. Fails with its own words if it fails."""
        returncode, out, err = self.outcome(code, *arguments, **variables)
        assert returncode == 0, err[-3000:]
        return out

    def outcome(self, code: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """The exit code of ``code``, what it printed and its standard error."""
        if self._process is None:
            command = [sys.executable, "-W", "ignore", "-c", FORKING, self._beginning]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, env=self._variables, text=True, **pipes)
        program, output, errors = files = [self._folder / name for name in ("program.py", "output", "errors")]
        for file, text in zip(files, (code, "", ""), strict=True):
            file.write_text(text)
        request = [str(program), arguments, variables, str(output), str(errors)]
        print(json.dumps(request), file=self._process.stdin, flush=True)
        told = self._process.stdout.readline()
        assert told, "the process that forks has ended"
        return int(told), output.read_text(), errors.read_text()

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)


MODULE = "import runpy; runpy.run_module({!r}, run_name='__main__')"
"""A program that is as ``python -m`` of a name."""


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
