"""The answers nobody wrote: every entry point of the installed CUDA headers that the C sources leave out.

Each succeeds and counts its use. What a prototype returns through a pointer that can only point to the host is written
where its meaning is plain: a new handle, a size of zero. The rest is left alone and listed as *unwritten*, so that a
test can tell that one was used.

Prototypes come out of the preprocessor, so macros have done their work: names are those of the newest version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HEADERS = (
    "stdint.h",
    "stdalign.h",
    "cuda.h",
    "cuda_runtime_api.h",
    "cublas_v2.h",
    "cublasLt.h",
    "cudnn.h",
    "cufft.h",
    "cufftXt.h",
    "cusolverDn.h",
    "cusolverSp.h",
    "cusparse.h",
    "cusparseLt.h",
    "nccl.h",
    "nvrtc.h",
)

# What the compiler's own headers would say to C that is for the host. They come with nvcc, which torch does not need.
SHIMS = {
    "crt/host_defines.h": "\n".join(
        f"#define {name}"
        for name in (
            "CUDARTAPI",
            "CUDARTAPI_CDECL",
            "__host__",
            "__device__",
            "__global__",
            "__device_builtin__",
            "__device_builtin_texture_type__",
            "__device_builtin_surface_type__",
            "__cudart_builtin__",
            "__align__(n) __attribute__((aligned(n)))",
            "__builtin_align__(n) __attribute__((aligned(n)))",
        )
    )
    + "\n",
    "crt/host_config.h": "",
    "nv/target": "",
    "cuda_runtime.h": "#include <cuda_runtime_api.h>\n",
    # cusparseLt's header of torch 2.11 asks for C++'s names of C's headers.
    "cstddef": "#include <stddef.h>\n",
    "cstdint": "#include <stdint.h>\n",
}

# Called by torch, and in no header for C.
WITHOUT_PROTOTYPE = (
    "cudaProfilerStart",
    "cudaProfilerStop",
    "ncclDevCommCreate",
    "ncclDevCommDestroy",
    "ncclGetLsaMultimemDevicePointer",
    "ncclGetPeerDevicePointer",
)

# Asked of the real library beside torch, which can tell without a driver: versions and texts.
_REAL = re.compile(
    r"cudnnGet(Version|CudartVersion|MaxDeviceVersion|ErrorString|LastErrorString|Property)"
    r"|cublasLtGet(Version|CudartVersion|Property)|cublasGet(CudartVersion|Property)"
    r"|(cublas|cublasLt|cufft|cusolver|cusparse|cusparseLt)Get(StatusString|StatusName|ErrorString|ErrorName|Property)"
    r"|cusparseGetVersion|cusolverGetVersion|cufftGetVersion"
)
_OWN = re.compile(r"(?:__cuda|cuda[A-Z]|cublas|cudnn|cufft|cusolver|cusparse|nccl|nvrtc|cu(?!File)[A-Z])\w*")
_ATTRIBUTE = re.compile(r"__attribute__\s*\(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\)")
_QUALIFIER = re.compile(r"\b(?:extern|__extension__|__restrict|__restrict__|__inline|__inline__)\b")
_PROTOTYPE = re.compile(
    r"(?<=[;}])\s*((?:const\s+|struct\s+|enum\s+|unsigned\s+)*[A-Za-z_]\w*[\s*]+?)\s*\b(\w+)\s*\(([^;{}]*?)\)\s*(?=;)"
)
_HANDLE = re.compile(r"typedef\s+(?:const\s+)?(?:struct\s+\w+|void)\s*\*\s*(\w+)\s*;")
_PARAMETER = re.compile(r"(.*[\s*])(\w+)\s*((?:\[\w*\])*)")
_ENTRY = re.compile(r"^ENTRY\s[\w\s*]*?\b(\w+)\s*\(", re.MULTILINE)
_PLACEHOLDER = re.compile(r"^NOT_THERE\((\w+)\)", re.MULTILINE)
_VERSION = re.compile(r"^#define\s+(cu[A-Z]\w*)\s+(?:__CUDA_API_PT(?:DS|SZ)\()?(cu[A-Z]\w*)\)?\s*$", re.MULTILINE)

# Libraries of mathematics take pointers to device memory for data. In the others every pointer may be to the host.
_MATHEMATICS = re.compile(r"cublas(?!Lt)|cudnn|cufft|cusolver|cusparse(?!Lt)")
_HOST_INTEGERS = re.compile(r"[lL]work|pBufferSize(InBytes)?|(h_)?meig|rows|cols|nnz|workSize")
_STATUS = re.compile(r"(?:dev|d_)?[iI]nfo(?:Array)?|position|nnzTotalDevHostPtr")  # on the host or on the device
_COUNT = re.compile(r"batch_?(?:Size|Count|size|count)")
_DEVICE_DATA = re.compile(
    r"(?:void|float|double|cu(?:Double)?Complex|cufft\w+|__half|(?:long long )?int|u?int\d+_t|char)\**"
)
_ENDS = re.compile(r"Destroy|Free|Release|Unload")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter, as the prototype has it. ``target`` is what it points to, None where it is no pointer."""

    text: str
    name: str
    target: str | None
    constant: bool


@dataclass(frozen=True, slots=True)
class Prototype:
    """A function as a header declares it."""

    name: str
    returns: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer. ``unwritten`` names the pointers that the real function writes to and this one does not."""

    prototype: Prototype
    written: tuple[str, ...]
    """What it does before it succeeds, statements of C."""
    unwritten: tuple[str, ...]


def is_ours(name: str) -> bool:
    """Whether an entry point is to be answered by this library and not by the real one."""
    return _OWN.fullmatch(name) is not None and _REAL.fullmatch(name) is None


def written_by_hand(sources: Iterable[str]) -> set[str]:
    """The entry points that C sources define."""
    return {name for text in sources for pattern in (_ENTRY, _PLACEHOLDER) for name in pattern.findall(text)}


def parse_prototypes(preprocessed: str) -> dict[str, Prototype]:
    """Every function that preprocessed C declares and that is ours to answer, by its name."""
    text = _QUALIFIER.sub("", _ATTRIBUTE.sub("", re.sub(r"^#.*$", "", preprocessed, flags=re.MULTILINE)))
    found = {}
    for returns, name, parameters in _PROTOTYPE.findall(text):
        if is_ours(name) and "typedef" not in returns:
            found[name] = Prototype(name, " ".join(returns.split()), tuple(_parameters(parameters)))
    return found


def parse_handles(preprocessed: str) -> set[str]:
    """The names of pointer types whose content is nobody's business."""
    return set(_HANDLE.findall(preprocessed))


def parse_versions(macros: str) -> dict[str, str]:
    """The driver's names that ``cuda.h`` maps to a newer version, from the output of ``cc -E -dM``."""
    return {plain: current for plain, current in _VERSION.findall(macros) if plain != current}


def _parameters(text: str) -> Iterable[Parameter]:
    depth, start, parts = 0, 0, []
    for at, character in enumerate(text + ","):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(" ".join(text[start:at].split()))
            start = at + 1
    for number, part in enumerate(parts):
        if part in ("", "void"):
            continue
        match = _PARAMETER.fullmatch(part)
        if match is None or match[2] in ("int", "long", "char", "short"):
            # A pointer to a function has its name in the middle; any other has none, which a definition needs.
            yield Parameter(part if "(" in part else f"{part} p{number}", f"p{number}", None, constant=True)
            continue
        kind, name, brackets = match[1], match[2], match[3]
        base, levels = kind.partition("*")[0], kind.count("*") + brackets.count("[")
        target = " ".join(re.sub(r"\b(const|struct|enum)\b", "", base).split()) + "*" * (levels - 1)
        yield Parameter(part, name, target if levels else None, re.search(r"\bconst\b", base) is not None)


def make_answer(prototype: Prototype, handles: set[str]) -> Answer:
    """What the generated function for ``prototype`` writes, and what it leaves."""
    written, unwritten = [], []
    counts = [parameter.name for parameter in prototype.parameters if _COUNT.fullmatch(parameter.name)]
    for parameter in prototype.parameters:
        target, name = parameter.target, parameter.name
        if target is None or parameter.constant or _ENDS.search(prototype.name):
            continue
        if target in handles:
            written.append(f"if ({name}) *{name} = fresh_handle();")
        elif target == "size_t" or (_HOST_INTEGERS.fullmatch(name) and target in ("int", "int64_t")):
            written.append(f"if ({name}) *{name} = 0;")
        elif target == "int" and _STATUS.fullmatch(name):
            value = "-1" if name == "position" else "0"  # no pivot was zero; nothing failed
            # cuBLAS has one status for the call itself beside the array of those of the batch; cuSOLVER has only those.
            each = counts and (name.endswith("Array") or prototype.name.startswith("cusolver"))
            written.append(f"if ({name}) memory_set({name}, {value}, sizeof(int) * {counts[0] if each else 1});")
        elif _points_to_host(prototype.name, parameter):
            unwritten.append(name)
    return Answer(prototype, tuple(written), tuple(unwritten))


def _points_to_host(function: str, parameter: Parameter) -> bool:
    """Whether a function may be meant to give something back through this pointer, for all that its type tells."""
    target = parameter.target or ""
    if _MATHEMATICS.match(function) is None:
        return target != "void" or "Get" in function  # otherwise void is data, or a caller's closure
    return _DEVICE_DATA.fullmatch(target) is None or ("Get" in function and target != "void")


def generate(
    answers: Iterable[Answer], loose: Iterable[str], versions: Mapping[str, str]
) -> tuple[str, str, list[str]]:
    """Two C files, one with the headers' prototypes and one for names without, and the names by their numbers."""
    lines = [f"#if __has_include(<{header}>)\n#include <{header}>\n#endif" for header in HEADERS]
    lines += [
        '#include "answers.h"',
        '#include "memory.h"',
        "void *fresh_handle(void);",
        '#define ENTRY __attribute__((visibility("default")))',
    ]
    names: list[str] = []
    for answer in answers:
        lines.append(_definition(answer, len(names)))
        names.append(answer.prototype.name)
    untyped = ['#include "answers.h"', '#define ENTRY __attribute__((visibility("default")))']
    for name in loose:
        untyped.append(f"ENTRY int {name}(void) {{ answer_used({len(names)}); return 0; }}")
        names.append(name)
    untyped.append(f"const unsigned answer_count = {len(names)}, answer_version_count = {len(versions)};")
    pairs = ", ".join(f'{{"{plain}", "{current}"}}' for plain, current in sorted(versions.items()))
    untyped.append(f"const struct answer_name answer_versions[] = {{{pairs}}};")
    return "\n".join(lines) + "\n", "\n".join(untyped) + "\n", names


def _definition(answer: Answer, number: int) -> str:
    prototype = answer.prototype
    parameters = ", ".join(parameter.text for parameter in prototype.parameters) or "void"
    writes = "".join(f" {statement}" for statement in answer.written)
    result = "" if prototype.returns == "void" else f" return ({prototype.returns}){{0}};"
    return f"ENTRY {prototype.returns} {prototype.name}({parameters}) {{ answer_used({number});{writes}{result} }}"
