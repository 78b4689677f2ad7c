"""Compiling kernels with Inductor, ahead of time: once for a machine, into a folder that later runs load from."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from amct_lightning.quantizers import functional
from amct_lightning.quantizers.executors import kernels
from amct_lightning.quantizers.executors.kernels import Kernel, KernelModule
from amct_lightning.quantizers.functions import activation, weight

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
"""A kernel: from its inputs to its outputs; no graph is made of it."""

_SOURCES = (functional, activation, weight, kernels, sys.modules[__name__])


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``AMCT_LIGHTNING_CACHE``, or a folder in the user's cache.

    It is another one for another version of torch or of the formulas, and another kind of CPU: kernels use every
    instruction of the one that they are compiled on, and a home folder may be shared by several.
    """
    root = os.environ.get("AMCT_LIGHTNING_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amct_lightning"
    return base / "kernels" / _key()


@cache  # the package may be replaced on the disk while a training runs
def _key() -> str:
    sources = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in _SOURCES)
    facts = (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), _cpu(), _gpu(), sources)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def has_compiler(device: str) -> bool:
    """Tell whether kernels for a type of device can be compiled here, as far as can be told without trying.

    Those for CUDA devices have never been run, so they have to be asked for.

    Args:
        device: Type of the device.
    """
    return device == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def load(kernel: Kernel) -> Compiled:
    """Return a kernel, from the folder if it is there as it was written, else compiled; that takes some seconds.

    Args:
        kernel: Which one.

    Raises:
        Exception: Whatever Inductor, the compiler or the file system raises if it cannot be had.
    """
    path = cache_folder() / f"{kernel}.pt2"
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(path.with_suffix(".lock")):  # other processes of the same training wait for it
            if not _is_whole(path):
                sys.stderr.write(f"Compiling a quantization kernel, once for this machine: {path}\n")
                _compile(kernel, path)
    return _loaded(path)


def _is_whole(path: Path) -> bool:
    """Tell whether a kernel is there and is what was written: a damaged one could end the process that runs it."""
    try:
        return _digest_file(path).read_text(encoding="ascii") == _digest(path)
    except (FileNotFoundError, ValueError):
        return False


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(kernel: Kernel, path: Path) -> None:
    module = KernelModule(kernel)
    # However many threads there are when it runs.
    configs: dict[str, Any] = {"cpp.dynamic_threads": True, "aot_inductor.compile_wrapper_opt_level": "O1"}
    if kernel.device == "cuda":  # a quotient in the last bit is another code near a tie
        configs["eager_numerics.division_rounding"] = True
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _Quiet(), torch.no_grad():
        exported = torch.export.export(module, module.examples(), dynamic_shapes=(_axes(module.examples()),))
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(folder) / path.name), inductor_configs=configs
        )
        digest = Path(folder) / "digest"
        digest.write_text(_digest(Path(made)), encoding="ascii")
        Path(made).replace(path)
        digest.replace(_digest_file(path))  # the last, so that what is half done is done again


def _axes(examples: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    names = {2: ("rows", "columns"), 1: ("n",)}
    dims = {name: torch.export.Dim(name, min=2) for pair in names.values() for name in pair}
    return tuple(
        {axis: dims[name] for axis, name in enumerate(names.get(tensor.dim(), ())) if tensor.shape[axis] > 1}
        for tensor in examples
    )


def _loaded(path: Path) -> Compiled:
    # The object itself takes apart and checks nested arguments in every call, eight times as long as the call.
    loader = torch._inductor.aoti_load_package(str(path)).loader
    run: Compiled = loader.run
    return run


def _cpu() -> str:
    """Return what instructions the CPU has, as far as the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


class _Quiet:
    """Keep Inductor's own log lines and warnings, which are about itself, to itself."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._loggers = [logging.getLogger("torch._inductor"), logging.getLogger("torch._export")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        self._warnings.__exit__(*error)
