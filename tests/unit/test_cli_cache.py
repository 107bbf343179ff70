"""``autobatch cache``: the answers are listed as they were kept, and cleared without anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autobatch.cli import main
from autobatch.probe.cache import CACHE_VARIABLE, ResultCache
from autobatch.result import BatchSizeResult, Outcome, Trial
from autobatch.units import GIB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "answers"))
    return tmp_path / "answers"


@pytest.fixture
def kept(folder: Path) -> ResultCache:
    cache = ResultCache(folder)
    for size, environment in ((8, {"workload": "gpt2", "device": "A100", "virtual": True}), (9, {})):
        result = BatchSizeResult(
            batch_size=size,
            proof="next_size_failed",
            smallest_failure=None,
            trials=(Trial(batch_size=size, outcome=Outcome.FITS),),
            environment=environment,
            budget_bytes=40 * GIB if environment else None,
        )
        cache.put({"options": {"headroom": 0.05, "limit_bytes": None} if environment else {}, "size": size}, result)
    return cache


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


@pytest.mark.usefixtures("kept")
def test_answers_are_listed(folder: Path):
    lines = [line.split() for line in run("list").stdout.splitlines()]
    assert lines[0] == ["found", "workload", "device", "budget", "headroom", "batch"]
    assert lines[1][2:] == ["gpt2", "A100", "(virtual)", "40.00", "GiB", "5%", "8"]
    assert lines[2][2:] == ["unknown", "unknown", "unknown", "unknown", "9"]
    assert lines[3] == ["2", "in", str(folder)]


@pytest.mark.usefixtures("kept")
def test_json_has_the_same(folder: Path):
    plain = json.loads(run("list", "--json").stdout)
    assert plain["folder"] == str(folder)
    assert [row["batch_size"] for row in plain["answers"]] == [8, 9]
    assert plain["answers"][0]["options"] == {"headroom": 0.05}


def test_no_answers(folder: Path):
    assert run("list").stdout == f"No answers in {folder}\n"
    assert json.loads(run("list", "--json").stdout)["answers"] == []
    assert run("clear").stdout == f"Removed 0 answers from {folder}\n"
    assert not folder.exists()


def test_a_file_that_is_no_answer_is_one_line_on_stderr(kept: ResultCache):
    (kept.folder / f"{'0' * 64}.json").write_text("{")
    shown = run("list")
    assert shown.exit_code == 0
    assert "2 in " in shown.stdout
    (line,) = shown.stderr.splitlines()
    assert line.startswith("Warning: ")
    assert "is passed over" in line


def test_clear_removes_answers_and_nothing_else(kept: ResultCache):
    (kept.folder / "mine.json").write_text("{}")
    assert run("clear").stdout == f"Removed 2 answers from {kept.folder}\n"
    assert [path.name for path in kept.folder.glob("*.json")] == ["mine.json"]
    assert kept.entries() == []


def test_a_folder_that_is_none_is_told_when_cleared(kept: ResultCache, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    shown = run("clear")
    assert shown.exit_code == 3
    assert "cannot be cleared" in shown.stderr
