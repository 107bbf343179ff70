"""Compiles the driver of virtual GPUs, once per CUDA version and version of its sources.

The library lies in the user's cache folder, which is the user's alone: what is loaded into every process must come
from nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autobatch.errors import DeviceNotFoundError
from autobatch.virtual import stubs
from autobatch.virtual.host import Torch, check_host

_SOURCES = Path(__file__).with_name("driver")
_NVML_SOURCE = _SOURCES / "nvml.c"
_LIBRARY = "libautobatch_cuda.so"
_NVML = "libnvidia-ml.so.1"
_ALIASES = ("libcuda.so.1", "libcuda.so")  # what programs open by name
_ANSWERS = "answers.json"
_VERSION = "version"
_SCRATCH = "scratch"
_FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")
# Zig makes its own run-time library with the first link: in half a minute, or with -O1 in five seconds.
_LINK = ("-shared", "-O1", "-Wl,-z,nodelete", "-Wl,-Bsymbolic")


def driver_folder() -> Path:
    """The folder with the driver for the installed torch, built if it is not there yet.

    Raises:
        DeviceNotFoundError: saying what to install, where there is no CUDA 13 build of torch, no C compiler, or
            another platform than Linux on x86-64 or ARM.
    """
    torch = check_host()
    version = _version(torch)
    root = _cache_root()
    folder = root / f"cuda{torch.cuda}-{platform.machine()}-{version[:16]}"
    if _is_good(folder, version):
        return folder
    with _locked(root):
        if not _is_good(folder, version):
            _build(torch, version, folder)
    return folder


def preload_libraries(folder: Path) -> list[Path]:
    """The libraries of ``folder``, in the order in which they must be loaded before torch's."""
    return [folder / _LIBRARY, folder / _NVML]


def read_calls(folder: Path, counts: Path) -> dict[str, int]:
    """How often each generated answer was used, from the file that ``AUTOBATCH_VIRTUAL_CALLS`` named."""
    names = list(read_answers(folder))
    data = counts.read_bytes() if counts.exists() else b""
    numbers = [int.from_bytes(data[at : at + 8], sys.byteorder) for at in range(0, len(data), 8)]
    return {name: number for name, number in zip(names, numbers, strict=False) if number}


def read_answers(folder: Path) -> dict[str, list[str]]:
    """The generated answers in the order of their numbers, each with the pointers it leaves unwritten."""
    answers: dict[str, list[str]] = json.loads((folder / _ANSWERS).read_text())
    return answers


# ---- what there is


@functools.cache
def _version(torch: Torch) -> str:
    """A hash of all that decides what the library is: our sources, and the headers it is built from."""
    digest = hashlib.sha256(f"{torch.cuda} {platform.machine()} {_FLAGS} {_LINK}".encode())
    files = [*sorted(_SOURCES.iterdir()), Path(__file__), Path(stubs.__file__)]
    files += [place / name for name in stubs.HEADERS for place in torch.includes if (place / name).exists()]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# ---- the user's cache folder


def _cache_root() -> Path:
    from platformdirs import user_cache_path

    root = user_cache_path("autobatch") / "driver"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_private(root):
            root.chmod(0o700)  # fails, as it should, where the folder is somebody else's
    except OSError as error:
        raise DeviceNotFoundError(
            f"the virtual GPU's driver has no place in the cache folder {root}: {error}"
        ) from error
    return root


def _is_private(path: Path) -> bool:
    about = path.lstat()
    shared = stat.S_IWGRP | stat.S_IWOTH
    return about.st_uid == os.geteuid() and (stat.S_ISLNK(about.st_mode) or not about.st_mode & shared)


def _is_good(folder: Path, version: str) -> bool:
    """Whether ``folder`` holds a driver of this version that nobody else has written or can write."""
    names = (_LIBRARY, _NVML, *_ALIASES, _ANSWERS, _VERSION)
    try:
        return (
            all(_is_private(path) for path in (folder, *(folder / name for name in names)))
            and all(os.readlink(folder / alias) == _LIBRARY for alias in _ALIASES)
            and (folder / _VERSION).read_text() == version
        )
    except OSError:
        return False


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(root / "lock", mode=0o600):
        yield


# ---- compiling


def compiler() -> list[str]:
    """The command that compiles C: ``cc``, else the ``ziglang`` package.

    Raises:
        DeviceNotFoundError: where there is neither.
    """
    if shutil.which("cc"):
        return ["cc"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise DeviceNotFoundError(
        "virtual GPUs need a C compiler: install gcc or clang (Debian, Ubuntu: apt install gcc), or pip install ziglang"
    )


def _build(torch: Torch, version: str, folder: Path) -> None:
    """Compiles into a new folder and puts it in place at once. Programs that run keep what they have loaded."""
    command = compiler()
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="build-"))
    replaced = folder.with_name(f"{work.name}-replaced")
    try:
        _compile(command, torch, work)
        shutil.rmtree(work / _SCRATCH)
        (work / _VERSION).write_text(version)
        for path in work.iterdir():
            if not path.is_symlink():
                path.chmod(0o600)
        if os.path.lexists(folder):
            folder.rename(replaced)
        work.rename(folder)
    finally:
        for path in (work, replaced):
            shutil.rmtree(path, ignore_errors=True)
            if os.path.lexists(path):  # no folder, or one that cannot be removed
                path.unlink()


def _compile(command: list[str], torch: Torch, work: Path) -> None:
    scratch = work / _SCRATCH
    for name, text in stubs.SHIMS.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(text)
    include = [f"-I{_SOURCES}", f"-isystem{scratch}", *(f"-isystem{path}" for path in torch.includes)]
    generated = _generate(command, include, work)
    written = sorted(path for path in _SOURCES.glob("*.c") if path.name != "nvml.c")
    compile_ = [*command, *_FLAGS, *include, "-c"]
    # The headers' own declarations draw warnings in the generated files: deprecated types, unused parameters.
    jobs = [[*compile_, "-w", str(path), "-o", f"{path}.o"] for path in generated]
    jobs += [[*compile_, str(path), "-o", str(work / _SCRATCH / f"{path.stem}.o")] for path in [*written, _NVML_SOURCE]]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    objects = {Path(job[-1]).stem: job[-1] for job in jobs}
    nvml = [objects.pop("nvml"), objects["state"]]
    link = [*command, *_LINK]
    _run([*link, "-Wl,-soname,libcuda.so.1", "-o", str(work / _LIBRARY), *objects.values(), "-ldl", "-lpthread"])
    _run([*link, f"-Wl,-soname,{_NVML}", "-o", str(work / _NVML), *nvml, "-lpthread"])
    for alias in _ALIASES:
        (work / alias).symlink_to(_LIBRARY)


def _generate(command: list[str], include: list[str], work: Path) -> list[Path]:
    probe = work / _SCRATCH / "headers.c"
    probe.write_text("".join(f"#if __has_include(<{name}>)\n#include <{name}>\n#endif\n" for name in stubs.HEADERS))
    text = _run([*command, *include, "-E", "-P", str(probe)])
    macros = _run([*command, *include, "-E", "-dM", str(probe)])
    by_hand = stubs.written_by_hand(path.read_text() for path in _SOURCES.glob("*.c"))
    prototypes, handles = stubs.parse_prototypes(text), stubs.parse_handles(text)
    answers = [stubs.make_answer(p, handles) for name, p in sorted(prototypes.items()) if name not in by_hand]
    loose = [name for name in stubs.WITHOUT_PROTOTYPE if name not in by_hand and name not in prototypes]
    typed, untyped, names = stubs.generate(answers, loose, stubs.parse_versions(macros))
    unwritten = {answer.prototype.name: list(answer.unwritten) for answer in answers}
    (work / _ANSWERS).write_text(json.dumps({name: unwritten.get(name, []) for name in names}))
    paths = [work / _SCRATCH / "typed.c", work / _SCRATCH / "untyped.c"]
    paths[0].write_text(typed)
    paths[1].write_text(untyped)
    return paths


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000]
        raise DeviceNotFoundError(
            f"the virtual GPU's driver does not compile with {command[0]}:\n{errors or done.stderr[-2000:]}"
        )
    return done.stdout
