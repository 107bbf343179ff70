import ctypes
import importlib.machinery
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from autobatch.errors import DeviceNotFoundError
from autobatch.virtual import build, stubs
from autobatch.virtual.build import driver_folder, preload_libraries
from autobatch.virtual.host import check_host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="virtual GPUs need Linux")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with the driver in it."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        driver_folder()
    return root


@pytest.fixture
def built(cache, tmp_path, monkeypatch):
    """A copy of it to spoil, and how often it is built from here on."""
    shutil.copytree(cache, tmp_path / "cache", symlinks=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builds = []

    def rebuild(torch, version, folder):
        builds.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        [original] = (cache / "autobatch" / "driver").glob("cuda*")
        shutil.copytree(original, folder, symlinks=True)

    monkeypatch.setattr(build, "_build", rebuild)
    [folder] = (tmp_path / "cache" / "autobatch" / "driver").glob("cuda*")
    return SimpleNamespace(folder=folder, builds=builds)


def test_what_the_folder_holds(cache):
    [folder] = (cache / "autobatch" / "driver").glob("cuda*")
    assert preload_libraries(folder) == [folder / "libautobatch_cuda.so", folder / "libnvidia-ml.so.1"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.json",
        "libautobatch_cuda.so",
        "libcuda.so",
        "libcuda.so.1",
        "libnvidia-ml.so.1",
        "version",
    ]
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "lock"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_good_driver_is_not_built_again(built):
    assert driver_folder() == built.folder
    assert built.builds == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "libautobatch_cuda.so").chmod(0o620),
        lambda folder: (folder / "libnvidia-ml.so.1").chmod(0o602),
        lambda folder: folder.chmod(0o770),
        lambda folder: (folder / "version").write_text("another"),
        lambda folder: (folder / "libnvidia-ml.so.1").unlink(),
        lambda folder: (folder / "answers.json").unlink(),
        lambda folder: ((folder / "libcuda.so.1").unlink(), (folder / "libcuda.so.1").symlink_to("/elsewhere.so")),
        shutil.rmtree,
    ],
)
def test_what_is_not_ours_alone_or_not_whole_is_built_anew(built, spoil):
    spoil(built.folder)
    assert driver_folder() == built.folder
    assert built.builds == [built.folder]


def test_somebody_elses_library_is_built_anew(built, monkeypatch):
    real, library = Path.lstat, built.folder / "libautobatch_cuda.so"

    def lstat(path):
        about = real(path)
        if path == library and not built.builds:
            return SimpleNamespace(st_uid=about.st_uid + 1, st_mode=about.st_mode)
        return about

    monkeypatch.setattr(Path, "lstat", lstat)
    driver_folder()
    assert built.builds == [built.folder]


def test_other_sources_are_another_driver(built, monkeypatch, tmp_path):
    shutil.copytree(build._SOURCES, tmp_path / "driver")
    with (tmp_path / "driver" / "nccl.c").open("a") as source:
        source.write("// changed\n")
    monkeypatch.setattr(build, "_SOURCES", tmp_path / "driver")
    build._version.cache_clear()
    try:
        assert driver_folder() != built.folder
        assert len(built.builds) == 1
    finally:
        build._version.cache_clear()


def test_the_cache_folder_is_closed_to_others(built):
    built.folder.parent.chmod(0o777)
    driver_folder()
    assert stat.S_IMODE(built.folder.parent.stat().st_mode) == 0o700


def test_a_cache_folder_that_cannot_be_is_named(tmp_path, monkeypatch):
    (tmp_path / "autobatch").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DeviceNotFoundError, match=f"cache folder {tmp_path}"):
        driver_folder()


def test_a_whole_build_replaces_one_that_is_spoiled_and_two_at_once_build_one(cache):
    """The real compiler, from two processes: it takes its turn, and the second finds the work done."""
    [folder] = (cache / "autobatch" / "driver").glob("cuda*")
    before = (folder / "libautobatch_cuda.so").stat().st_ino
    (folder / "version").write_text("another")
    command = [sys.executable, "-c", "from autobatch.virtual.build import *; print(driver_folder())"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [f"{folder}\n"] * 2
    assert (folder / "libautobatch_cuda.so").stat().st_ino != before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "lock"]


def test_the_sources_compile_without_a_warning(tmp_path):
    for name, text in stubs.SHIMS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    includes = [f"-isystem{path}" for path in [tmp_path, *check_host().includes]]
    sources = [str(path) for path in build._SOURCES.glob("*.c")]
    # Not only their syntax: some warnings are the optimizer's.
    command = [*build.compiler(), *build._FLAGS, "-Werror", f"-I{build._SOURCES}", *includes, "-c", *sources]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nvml_tells_the_cuda_version_of_the_headers(tmp_path):
    (tmp_path / "cuda.h").write_text("#define CUDA_VERSION 13070\n")
    library = tmp_path / "nvml.so"
    sources = [str(build._SOURCES / name) for name in ("nvml.c", "state.c")]
    flags = [*build._FLAGS, f"-I{tmp_path}", f"-I{build._SOURCES}", *build._LINK]
    subprocess.run([*build.compiler(), *flags, *sources, "-o", str(library), "-lpthread"], check=True)
    version = ctypes.c_int()
    assert ctypes.CDLL(str(library)).nvmlSystemGetCudaDriverVersion(ctypes.byref(version)) == 0
    assert version.value == 13070


def test_the_errors_that_are_given_have_their_names_and_words(cache):
    """Those and no others, as in NVIDIA's own library, which needs no GPU for that."""
    [folder] = (cache / "autobatch" / "driver").glob("cuda*")
    [cudart] = (check_host().includes[0].parent / "lib").glob("libcudart.so.*")
    ours, real = errors_of(folder / "libautobatch_cuda.so"), errors_of(cudart)
    assert ours.keys() == errors_in_sources()
    assert ours == {code: real[code] for code in ours}


def errors_of(library):
    """The name and the words of each error that the library knows, by number."""
    code = """
        import ctypes, json, sys
        cuda = ctypes.CDLL(sys.argv[1])
        cuda.cudaGetErrorName.restype = cuda.cudaGetErrorString.restype = ctypes.c_char_p
        asked = {n: [cuda.cudaGetErrorName(n).decode(), cuda.cudaGetErrorString(n).decode()] for n in range(1, 999)}
        print(json.dumps(asked))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(library)]
    asked = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        int(n): about
        for n, about in asked.items()
        if "unrecognized error code" not in about[1] and about[1] != "unknown error"
    }


def errors_in_sources():
    """The numbers of all errors that the sources name outside of the table of names, but for the unknown one."""
    headers = [check_host().includes[0] / name for name in ("cuda.h", "driver_types.h")]
    listed = re.compile(r"\b(cudaError[A-Z]\w+|CUDA_ERROR_\w+)\s*=\s*(\d+)")
    numbers = {name: int(number) for header in headers for name, number in listed.findall(header.read_text())}
    text = "".join(path.read_text() for path in build._SOURCES.glob("*.c"))
    text = re.sub(r"\} errors\[\] = \{.*?\};", "", text, flags=re.DOTALL)
    named = re.findall(r"\b(?:cudaError[A-Z]\w+|CUDA_ERROR_\w+)", re.sub(r"//.*", "", text))
    return {numbers[name] for name in named} - {numbers["cudaErrorUnknown"]}


# ---- what must be there


def have(monkeypatch, tmp_path, version):
    """A torch with this ``version.py``, seen without importing it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(version)
    spec = importlib.machinery.ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "torch")]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec if name == "torch" else None)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("__version__ = '2.14.1+cpu'\ncuda: str | None = None\n", "torch 2.14.1[+]cpu is built without CUDA"),
        ("__version__ = '2.12.0+cu126'\ncuda: str | None = '12.6'\n", "torch 2.12.0[+]cu126 is built for CUDA 12.6"),
        ("__version__ = '2.14.1+cu130'\ncuda: str | None = '13.0'\n", "without NVIDIA's headers [(]cuda.h, cudnn.h"),
        ("", "torch unknown is built without CUDA"),
    ],
)
def test_other_builds_of_torch_are_named(monkeypatch, tmp_path, version, words):
    have(monkeypatch, tmp_path, version)
    with pytest.raises(DeviceNotFoundError, match=words) as caught:
        driver_folder()
    assert "install torch" in str(caught.value)


def test_no_torch_at_all(monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceNotFoundError, match="need torch: install torch"):
        driver_folder()


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "ppc64le")])
def test_other_platforms(monkeypatch, system, machine):
    monkeypatch.setattr(build, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    with pytest.raises(DeviceNotFoundError, match=f"{machine}: use a container"):
        driver_folder()


def test_linking_is_optimised_as_compiling_is():
    """Else the first link of zig, which makes its run-time library, takes half a minute."""
    assert [flag for flag in build._FLAGS if flag.startswith("-O")] == [f for f in build._LINK if f.startswith("-O")]


def test_the_compiler_is_cc_or_zig_or_an_error_that_names_both(monkeypatch):
    spec = importlib.machinery.ModuleSpec("ziglang", None)
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec if name == "ziglang" else None)
    assert build.compiler() == ["cc"]
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.compiler() == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceNotFoundError, match=r"install gcc or clang.*pip install ziglang"):
        build.compiler()


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: ["sh", "-c", "echo 'x.c:1: error: no such thing' >&2; exit 1"])
    with pytest.raises(DeviceNotFoundError, match="no such thing"):
        driver_folder()
    assert [path.name for path in (tmp_path / "autobatch" / "driver").iterdir()] == ["lock"]


def test_building_needs_no_torch():
    code = "import autobatch.virtual.build, autobatch.virtual.state, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- generated answers

HEADER = """
typedef struct thing *cusolverThing_t;
typedef enum { A, B } cusolverStatus_t;
extern cusolverStatus_t cusolverCreate(cusolverThing_t *thing);
cusolverStatus_t cusolverDestroy(cusolverThing_t *thing) __attribute__((deprecated("x")));
cusolverStatus_t cusolverWork(cusolverThing_t thing, const float *a, int lda, int *lwork, size_t *bytes);
cusolverStatus_t cusolverRun(cusolverThing_t, float *a, float *const arrays[], int *devInfo, int batchSize);
cusolverStatus_t cusolverGetMode(cusolverThing_t thing, cusolverStatus_t *mode);
cudaError_t cudaWhatever(int *value, void *data);
const char *cusolverGetErrorString(cusolverStatus_t status);
void cudaVoid(void);
int printf(const char *format, ...);
typedef int (*cudaCallback_t)(int status);
"""


def answers():
    prototypes, handles = stubs.parse_prototypes(HEADER), stubs.parse_handles(HEADER)
    return {name: stubs.make_answer(prototype, handles) for name, prototype in prototypes.items()}


def test_prototypes_that_are_ours():
    assert set(answers()) == {
        "cusolverCreate",
        "cusolverDestroy",
        "cusolverWork",
        "cusolverRun",
        "cusolverGetMode",
        "cudaWhatever",
        "cudaVoid",
    }


def test_what_answers_write_and_what_they_leave():
    written = {name: answer.written for name, answer in answers().items()}
    assert written["cusolverCreate"] == ("if (thing) *thing = fresh_handle();",)
    assert written["cusolverWork"] == ("if (lwork) *lwork = 0;", "if (bytes) *bytes = 0;")
    assert written["cusolverRun"] == ("if (devInfo) memory_set(devInfo, 0, sizeof(int) * batchSize);",)
    unwritten = {name: answer.unwritten for name, answer in answers().items() if answer.unwritten}
    assert unwritten == {"cusolverGetMode": ("mode",), "cudaWhatever": ("value",)}


def test_the_generated_text():
    chosen = [answers()["cusolverCreate"], answers()["cudaVoid"]]
    typed, untyped, names = stubs.generate(chosen, ["ncclLoose"], {"cuB": "cuB_v2", "cuA": "cuA_v3"})
    assert names == ["cusolverCreate", "cudaVoid", "ncclLoose"]
    assert "ENTRY cusolverStatus_t cusolverCreate(cusolverThing_t *thing) { answer_used(0); if (thing)" in typed
    assert "ENTRY void cudaVoid(void) { answer_used(1); }" in typed
    assert "ENTRY int ncclLoose(void) { answer_used(2); return 0; }" in untyped
    assert '{{"cuA", "cuA_v3"}, {"cuB", "cuB_v2"}}' in untyped


def test_versions_of_the_drivers_names():
    macros = "#define cuMemAlloc cuMemAlloc_v2\n#define cuWrite __CUDA_API_PTSZ(cuWrite_v2)\n#define CU_X 3\n"
    assert stubs.parse_versions(macros) == {"cuMemAlloc": "cuMemAlloc_v2", "cuWrite": "cuWrite_v2"}


def test_every_entry_point_that_torch_needs_is_there(cache):
    """Nothing of torch's may reach a real library but what needs no driver: versions and texts."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    [folder] = (cache / "autobatch" / "driver").glob("cuda*")
    defined = symbols("--defined-only", folder / "libautobatch_cuda.so")
    needed = set()
    for library in (check_host().includes[0].parents[2] / "torch" / "lib").glob("lib*.so"):
        needed |= symbols("--undefined-only", library)
    ours = {name for name in needed if stubs.is_ours(name)}
    assert len(ours) > 500
    assert ours - defined == set()


def symbols(option, library):
    lines = subprocess.run(["nm", "-D", option, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in lines.splitlines()}


def test_the_list_of_answers_is_the_librarys(cache):
    [folder] = (cache / "autobatch" / "driver").glob("cuda*")
    listed = json.loads((folder / "answers.json").read_text())
    assert len(listed) > 2000
    assert "cudaMalloc" not in listed
    assert set(listed) <= symbols("--defined-only", folder / "libautobatch_cuda.so")
