"""The library of C++ kernels: compiled with the compiler of the system when it is first needed.

It has a plain C interface and includes nothing of torch, so that it compiles in two seconds and fits every version.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from amct_lightning.quantizers.executors.build import compiler
from amct_lightning.quantizers.executors.cache import cache_folder, cached, digest_of

FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
"""Every operation is rounded as in torch: nothing is contracted, and what is not reordered in the source stays so."""

_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LAST = (_NUMBER, _NUMBER)  # bits, threads
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "train": (_NUMBER, _POINTER, _POINTER, _COUNT, *[_POINTER] * 5, *_LAST),
    "convert": (_NUMBER, _POINTER, _POINTER, _COUNT, *[_POINTER] * 2, *_LAST),
    "gradients": (*[_POINTER] * 3, _COUNT, *[_POINTER] * 5, *_LAST),
    "weight": (_POINTER, _COUNT, _COUNT, *[_POINTER] * 2, *_LAST),
    "weight_values": (_POINTER, _COUNT, _COUNT, *[_POINTER] * 2, *_LAST),
    "weight_grid": (_POINTER, _COUNT, _COUNT, *[_POINTER] * 5, *_LAST),
    "scale_gradients": (_POINTER, _POINTER, _COUNT, _COUNT, *[_POINTER] * 3, *_LAST),
}

Run = Callable[..., int]
"""A function of the library; what it returns counts only where kernels.cpp says so."""

_LOG = logging.getLogger(__name__)


@cache
def function(name: str, *dtypes: torch.dtype) -> Run | None:
    """Return a function of the library, or ``None`` if there is no such one or no library here.

    Args:
        name: Its name, without prefix and dtypes.
        dtypes: Those of the values that it works on.
    """
    library = _library() if all(dtype in _DTYPES for dtype in dtypes) else None
    if library is None:
        return None
    found = getattr(library, "_".join(["amct", name, *(_DTYPES[dtype] for dtype in dtypes)]))
    found.argtypes = _ARGUMENTS[name]
    run: Run = found
    return run


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(cached(library_file(), partial(compile_library, _SOURCES[0]))))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # training goes on with other kernels
        line = str(error).strip().partition("\n")[0]
        _LOG.warning("Quantization runs without the kernels in C++ (%s: %s).", type(error).__name__, line)
        return None


def library_file() -> Path:
    """Return where the library is kept."""
    return (
        cache_folder() / f"kernels-{digest_of(*(source.read_text(encoding='utf-8') for source in _SOURCES), FLAGS)}.so"
    )


def sources_of(*names: str) -> list[Path]:
    """Return source files; the first is the one to compile.

    Args:
        names: Their names.
    """
    return [Path(__file__).with_name(name) for name in names]


def compile_library(source: Path, path: Path, options: Sequence[str] = ()) -> None:
    """Compile a source file.

    Args:
        source: The file.
        path: The library to write.
        options: Further options of the compiler.

    Raises:
        RuntimeError: If there is no compiler, or it refuses; with what it says.
    """
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler is found: neither the variable CXX nor g++ nor clang++ names one")
    command = [program, *FLAGS, str(source), *options, "-o", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{program} ends with status {done.returncode}")


_SOURCES = sources_of("kernels.cpp", "training.h", "activations.h", "weights.h", "numbers.h")
