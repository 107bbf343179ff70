"""Answers on disk: one JSON file for each question that was answered.

A question is a mapping of all that decides its answer. The file is named by the question's hash and holds the question
itself, so that two questions never share an answer. A file that cannot be read is passed over with a warning, and so is
a folder that cannot be written: a cache saves time and is never a reason to fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from autobatch.errors import AutobatchWarning, InvalidArgumentError
from autobatch.result import BatchSizeResult

CACHE_VARIABLE = "AUTOBATCH_CACHE_DIR"
"""Names the folder of the answers, in the place of the user's cache folder."""
CACHE_FORMAT = 1

_NAME = re.compile(r"[0-9a-f]{64}\.json")
_LOCK, _UNFINISHED = ".lock", ".unfinished"
_LOCK_WITHIN_S = 10.0  # whoever holds it writes one small file


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer that was kept."""

    question: Mapping[str, Any]
    saved_at_s: float
    """When, in seconds since 1970."""
    result: BatchSizeResult


class ResultCache:
    """The answers in one folder. The folder is made when the first answer is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, question: Mapping[str, Any]) -> Entry | None:
        """The answer to ``question``; None without one, or with one that cannot be read, which is said."""
        entry = self._read(self._path(question))
        # Two questions with one hash would be a wonder; a file that somebody renamed would not.
        return entry if entry is not None and _canonical(entry.question) == _canonical(question) else None

    def put(self, question: Mapping[str, Any], result: BatchSizeResult) -> None:
        """Keeps ``result`` in the place of any earlier answer: the whole of it or, killed in between, none of it."""
        body = {"question": question, "saved_at_s": time.time(), "result": json.loads(result.to_json())}
        text = json.dumps({"format": CACHE_FORMAT, "checksum": _hash(_canonical(body)), **body}, indent=2)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                # Under the lock there is one writer, so one name will do: what a killed writer left is overwritten.
                unfinished = self.folder / _UNFINISHED
                unfinished.write_text(text + "\n", encoding="utf-8")
                os.replace(unfinished, self._path(question))
        except (OSError, Timeout) as exc:
            _warn(f"the answer was not kept: the cache folder {self.folder} cannot be written ({_reason(exc)})")

    def drop(self, question: Mapping[str, Any]) -> None:
        """Forgets the answer to ``question``, if there is one."""
        try:
            with self._locked():
                self._path(question).unlink(missing_ok=True)
        except (OSError, Timeout) as exc:
            _warn(f"an answer that no longer holds stays in the cache folder {self.folder} ({_reason(exc)})")

    def entries(self) -> list[Entry]:
        """Every answer, the oldest first. Files that cannot be read are passed over with a warning."""
        found = [entry for path in self._files() if (entry := self._read(path)) is not None]
        return sorted(found, key=lambda entry: entry.saved_at_s)

    def clear(self) -> int:
        """Removes every answer, also one that cannot be read, and no other file; returns how many.

        Raises:
            OSError: where the folder cannot be written.
        """
        paths = self._files()
        if not self.folder.is_dir():
            return 0
        with self._locked():
            for path in (*paths, self.folder / _UNFINISHED):
                path.unlink(missing_ok=True)
        return len(paths)

    def _files(self) -> list[Path]:
        try:
            return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and not p.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            _warn(f"the cache folder {self.folder} cannot be read ({_reason(exc)})")
            return []

    def _path(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"{_hash(_canonical(question))}.json"

    def _read(self, path: Path) -> Entry | None:
        try:
            plain = json.loads(path.read_bytes())
            body = {name: plain[name] for name in ("question", "saved_at_s", "result")}
            if plain["format"] != CACHE_FORMAT or plain["checksum"] != _hash(_canonical(body)):
                raise ValueError("another format, or changed since it was written")
            result = BatchSizeResult.from_json(json.dumps(body["result"]))
            return Entry(question=body["question"], saved_at_s=body["saved_at_s"], result=result)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as exc:
            _warn(f"{path} is passed over: it is no answer that this autobatch can read ({_reason(exc)})")
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / _LOCK, timeout=_LOCK_WITHIN_S, mode=0o600):
            yield


def open_cache(cache: object) -> ResultCache | None:
    """The cache that ``cache`` means: None and False none, True the user's, a path that folder.

    Raises:
        InvalidArgumentError: if it is something else, or a file.
    """
    if cache is None or cache is False:
        return None
    if cache is not True and (not isinstance(cache, (str, os.PathLike)) or not os.fspath(cache)):
        raise InvalidArgumentError("cache", cache, "None, True for the user's cache folder, or the path of a folder")
    folder = default_folder() if cache is True else Path(cache).expanduser()
    if cache is not True and folder.exists() and not folder.is_dir():
        raise InvalidArgumentError("cache", cache, "a folder, and this is a file")
    return ResultCache(folder)


def default_folder() -> Path:
    """The folder that AUTOBATCH_CACHE_DIR names, else one in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("autobatch") / "answers"


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return f"{type(exc).__name__}: {exc}"


def _warn(message: str) -> None:
    warnings.warn(message, AutobatchWarning, stacklevel=3)
