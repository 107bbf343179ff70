"""The README's first example is run as it stands, and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_example_of_training_goes_as_the_readme_says(tmp_path: Path) -> None:
    promised = next(text for text in blocks("text") if text.startswith("batch "))
    command = [sys.executable, str(ROOT / "examples" / "trainer.py"), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250)
    # Figures of this machine and this moment; the words are the README's.
    without_figures = re.compile(r"[\d.]+")
    shown = [without_figures.sub("#", line) for line in done.stderr.splitlines()]
    for line in promised.strip().splitlines():
        words = without_figures.sub("#", line)
        assert any(other.split(";")[0] == words.split(";")[0] for other in shown), (words, shown)
    assert done.stdout.startswith("4096 = ")
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250)
    assert again.stderr.startswith("nothing is left to train: ")


def test_no_section_stands_there_twice() -> None:
    headings = re.findall(r"^#+ .*$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    assert sorted(set(headings)) == sorted(headings)
