"""The README's first example is run as it stands, and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(script: Path) -> str:
    command = [sys.executable, str(script)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=250, cwd=script.parent).stdout


def test_the_first_example_prints_what_it_says(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(blocks("python")[0])
    printed, promised = run(script), blocks("text")[0]
    assert printed.strip() == promised.strip()


def test_the_loop_trains_with_the_size_that_was_found() -> None:
    diff = blocks("diff")[0]
    script = ROOT / "examples" / "loop.py"
    assert re.search(r"trained with batches of \d+", run(script))
    for line in re.findall(r"^\+(.*)$", diff, re.MULTILINE):
        words = re.sub(r"\s+", "", line)
        assert words in re.sub(r"\s+", "", script.read_text())


def test_the_example_of_accumulation_prints_what_the_readme_says() -> None:
    printed = run(ROOT / "examples" / "accumulate.py")
    promised = next(text for text in blocks("text") if text.startswith("4096 = "))
    without_losses = re.compile(r"loss \d\.\d+")  # which are of random data
    assert without_losses.sub("", printed).strip() == without_losses.sub("", promised).strip()
