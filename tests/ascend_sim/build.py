"""Compiles csrc/ into the libraries that torch_npu is linked with, and into the library of the kernels."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
# Every library of CANN that torch_npu names; one holds the code and the others need it.
_ALIASES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "runtime")
_CANN_NAME = re.compile(r"(?:acl[a-z]*[A-Z]|aclprof|rt[A-Z]|Msprof|Hccl|Adx|Adump|ge[A-Z])[A-Za-z0-9]+")
_NAME_IN_DATA = re.compile(
    rb"(?<=\0)((?:aclrt|aclprof|aclmdl|aclsys|aclop|acl[A-Z]|Hccl|rt[A-Z])[A-Za-z0-9]{3,60})(?=\0)"
)
# These belong to libopapi.so. That there is no such library tells torch_npu to use aclop, which is simulated.
_NOT_OURS = re.compile(r"aclnn|aclCreate(Tensor|Scalar|IntArray|BoolArray|FloatArray|TensorList|ScalarList)$")
_DEFINED = re.compile(r"\b((?:acl|rt|Msprof|Hccl|Adx|ge)[A-Za-z0-9]+)\(")


class BuildError(RuntimeError):
    """A compiler reported an error."""


def build(torch_npu: Path, folder: Path) -> None:
    """Build all libraries into `folder`; `torch_npu` is the package's folder of the wheel."""
    stubs = folder / "stubs.inc"
    stubs.write_text("".join(f"STUB({name})\n" for name in sorted(_missing(torch_npu))))
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(_build_kernels, folder), pool.submit(_build_runtime, folder)]:
            job.result()


def _missing(torch_npu: Path) -> set[str]:
    """The CANN functions that the wheel asks for and csrc/ does not define: they become stubs that do nothing."""
    wanted: set[str] = set()
    for library in [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]:
        wanted |= _linked_names(library)
        wanted |= {name.decode() for name in _NAME_IN_DATA.findall(library.read_bytes())}  # looked up with dlsym
    defined = {name for source in SOURCES.glob("*.c") for name in _DEFINED.findall(source.read_text())}
    return {name for name in wanted - defined if _CANN_NAME.fullmatch(name) and not _NOT_OURS.match(name)}


def _linked_names(library: Path) -> set[str]:
    lines = _run("nm", "-D", "--undefined-only", library).splitlines()
    return {name for line in lines if "@" not in (name := line.split()[-1])}


def _build_runtime(folder: Path) -> None:
    sources = sorted(SOURCES.glob("*.c"))
    shared = ("-O2", "-shared", "-fPIC", "-pthread")
    _run("gcc", *shared, f"-I{folder}", *_named(folder, "ascendcl"), *sources, "-lrt", "-ldl")
    for name in _ALIASES:
        needs = ("-Wl,--no-as-needed", f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN")
        _run("gcc", *shared, *_named(folder, name), "-x", "c", "/dev/null", *needs)


def _named(folder: Path, name: str) -> tuple[str, str, str]:
    """The loader finds the library by its soname once it is loaded from anywhere."""
    return f"-Wl,-soname,lib{name}.so", "-o", str(folder / f"lib{name}.so")


def _build_kernels(folder: Path) -> None:
    torch_folder = _torch_folder()
    include = torch_folder / "include"
    # -O1, and all files as one: reading torch's headers takes longer than anything else.
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-isystem", str(include)]
    options += ["-isystem", f"{include}/torch/csrc/api/include", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    sources = [part for path in sorted(SOURCES.glob("*.cpp")) for part in ("-include", str(path))]
    libraries = (f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10")
    _run("g++", *options, *sources, "-o", folder / "libsimops.so", "-x", "c++", "/dev/null", "-x", "none", *libraries)


def _torch_folder() -> Path:
    [location] = find_spec("torch").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(location)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} ended with {done.returncode}: {done.stderr[:3000]}")
    return done.stdout
