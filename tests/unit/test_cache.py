"""The cache on disk: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobatch.errors import AutobatchWarning, InvalidArgumentError
from autobatch.probe import cache as cache_module
from autobatch.probe.cache import CACHE_VARIABLE, ResultCache, default_folder, open_cache
from autobatch.result import PROOFS, BatchSizeResult, Measurement, Outcome, Trial

QUESTION = {"workload": {"name": "resnet50"}, "device": {"device": "A100", "total_bytes": 40}}


def answer(size: int = 8, **rest: Any) -> BatchSizeResult:
    trial = Trial(batch_size=size, outcome=Outcome.FITS, steps=3)
    values = {"proof": "next_size_failed", "smallest_failure": size + 1, "trials": (trial,), **rest}
    return BatchSizeResult(batch_size=size, **values)


@pytest.fixture
def cache(tmp_path: Path) -> ResultCache:
    return ResultCache(tmp_path / "answers")


def path_of(cache: ResultCache) -> Path:
    (path,) = cache.folder.glob("*.json")
    return path


def test_nothing_is_found_and_nothing_made_before_an_answer_is_kept(cache):
    assert cache.get(QUESTION) is None
    assert cache.entries() == []
    assert cache.clear() == 0
    assert not cache.folder.exists()


def test_an_answer_comes_back_and_a_newer_one_takes_its_place(cache):
    cache.put(QUESTION, answer(8))
    cache.put(QUESTION, answer(9))
    assert cache.get(QUESTION).result == answer(9)
    assert [entry.result.batch_size for entry in cache.entries()] == [9]
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", path_of(cache).name]


def test_the_order_of_a_question_says_nothing(cache):
    cache.put(QUESTION, answer())
    assert cache.get(dict(reversed(QUESTION.items()))) is not None


def test_what_is_dropped_is_gone(cache):
    cache.put(QUESTION, answer())
    cache.drop(QUESTION)
    cache.drop(QUESTION)
    assert cache.get(QUESTION) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"format": 1}',
        b"[" * 100_000,
        b'{"format": 2, "question": 1}',
    ],
    ids=["empty", "bytes", "list", "null", "text", "nothing", "half", "deep", "other"],
)
def test_a_file_that_is_no_answer_is_passed_over_with_a_warning_and_overwritten(cache, content):
    cache.put(QUESTION, answer())
    path_of(cache).write_bytes(content)
    with pytest.warns(AutobatchWarning, match="is passed over"):
        assert cache.get(QUESTION) is None
    with pytest.warns(AutobatchWarning, match="is passed over"):
        assert cache.entries() == []
    cache.put(QUESTION, answer(9))
    assert cache.get(QUESTION).result.batch_size == 9


def test_an_answer_under_the_name_of_another_question_is_not_given(cache):
    cache.put(QUESTION, answer())
    other = {**QUESTION, "options": {"headroom": 0.1}}
    path_of(cache).rename(cache._path(other))
    assert cache.get(other) is None


def test_two_questions_with_one_hash_share_no_answer(cache, monkeypatch):
    other = {"workload": "another"}
    hash_of = cache_module._hash
    monkeypatch.setattr(
        cache_module, "_hash", lambda text: "0" * 64 if "checksum" not in text and text in texts else hash_of(text)
    )
    texts = {cache_module._canonical(QUESTION), cache_module._canonical(other)}
    cache.put(QUESTION, answer(8))
    assert cache.get(other) is None
    cache.put(other, answer(9))
    assert cache.get(QUESTION) is None
    assert cache.get(other).result.batch_size == 9


def test_clearing_removes_answers_and_nothing_else(cache):
    cache.put(QUESTION, answer())
    cache.put({"another": 1}, answer())
    path_of_corrupt = cache.folder / f"{'0' * 64}.json"
    path_of_corrupt.write_text("corrupt")
    mine = cache.folder / "notes.json"
    mine.write_text("mine")
    assert cache.clear() == 3
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "notes.json"]


def test_what_a_killed_writer_left_is_overwritten(cache):
    cache.folder.mkdir()
    (cache.folder / ".unfinished").write_text('{"format": 1, "ques')
    cache.put(QUESTION, answer())
    assert cache.get(QUESTION).result == answer()
    assert not (cache.folder / ".unfinished").exists()


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("mine")
    cache = ResultCache(tmp_path / "file" / "answers")
    with pytest.warns(AutobatchWarning, match="was not kept: the cache folder .* cannot be written"):
        cache.put(QUESTION, answer())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_warning(cache):
    cache.folder.mkdir(mode=0o500)
    with pytest.warns(AutobatchWarning, match="Permission denied"):
        cache.put(QUESTION, answer())


def test_a_lock_that_is_never_given_back_is_a_warning(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_LOCK_WITHIN_S", 0.05)
    cache.put(QUESTION, answer(8))
    with FileLock(cache.folder / ".lock"), pytest.warns(AutobatchWarning, match="was not kept"):
        cache.put(QUESTION, answer(9))
    assert cache.get(QUESTION).result.batch_size == 8


class TestWhichCache:
    def test_none(self):
        assert open_cache(None) is None
        assert open_cache(False) is None

    def test_the_users(self, tmp_path, monkeypatch):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "named"))
        assert open_cache(True).folder == tmp_path / "named"
        monkeypatch.delenv(CACHE_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder().is_relative_to(tmp_path)

    def test_another(self, tmp_path):
        assert open_cache(tmp_path).folder == tmp_path
        assert open_cache(str(tmp_path)).folder == tmp_path

    @pytest.mark.parametrize("value", [1, "", 2.5, ["folder"], b"folder"])
    def test_what_is_none_of_these_is_refused(self, value):
        with pytest.raises(InvalidArgumentError, match=r"cache=.*must be None, True"):
            open_cache(value)

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InvalidArgumentError, match="a folder, and this is a file"):
            open_cache(tmp_path / "file")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
questions = st.dictionaries(st.text(max_size=8), plain, max_size=4)
counts = st.none() | st.integers(0, 2**50)
measurements = st.none() | st.builds(
    Measurement, peak_allocated_bytes=counts, peak_reserved_bytes=counts, capacity_bytes=counts,
    step_time_s=st.none() | st.floats(0, 1e6),
)  # fmt: skip
trials = st.builds(
    Trial, batch_size=st.integers(1, 2**40), outcome=st.sampled_from(Outcome), measurement=measurements,
    message=st.text(max_size=20), mode=st.sampled_from(["train", "eval"]), history=st.text(max_size=8),
)  # fmt: skip
results = st.builds(
    BatchSizeResult, batch_size=st.integers(1, 2**40), proof=st.sampled_from(PROOFS), smallest_failure=counts,
    trials=st.lists(trials, min_size=1, max_size=4).map(tuple), confirmation=st.lists(trials, max_size=2).map(tuple),
    eval_batch_size=counts, budget_bytes=counts, notes=st.lists(st.text(), max_size=2).map(tuple),
    environment=st.dictionaries(st.text(max_size=8), plain, max_size=3),
)  # fmt: skip


def round_trip(folder: Path, first: Any, second: Any, one: BatchSizeResult, two: BatchSizeResult) -> None:
    """Two questions keep two answers, unless they are one question."""
    cache = ResultCache(folder)
    cache.clear()
    cache.put(first, one)
    assert cache.get(first).result == one
    cache.put(second, two)
    assert cache.get(second).result == two
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert cache.get(first).result == (two if same else one)


def corruption(folder: Path, question: Any, result: BatchSizeResult, at: float, change: bytes) -> None:
    """Whatever bytes are written into a file: its answer comes back as it was, or not at all."""
    cache = ResultCache(folder)
    cache.clear()
    cache.put(question, result)
    path = cache._path(question)
    data = path.read_bytes()
    start = int(at * len(data))
    path.write_bytes(data[:start] + change if len(change) % 2 else data[:start] + change + data[start + len(change) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutobatchWarning)
        found = cache.get(question)
        assert found is None or found.result == result
        cache.put(question, result)
    assert cache.get(question).result == result


RUNS = [
    pytest.param(50, id="50"),
    pytest.param(1000, id="1000", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
]


@pytest.mark.parametrize("examples", RUNS)
def test_any_answer_to_any_question_comes_back(tmp_path, examples):
    run = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    run(given(st.just(tmp_path), questions, questions, results, results)(round_trip))()


@pytest.mark.parametrize("examples", RUNS)
def test_no_corruption_becomes_an_answer(tmp_path, examples):
    run = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    run(given(st.just(tmp_path), questions, results, st.floats(0, 1), st.binary(max_size=40))(corruption))()
