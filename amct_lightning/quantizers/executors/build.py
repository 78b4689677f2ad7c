"""Compiling kernels with Inductor, ahead of time: once for a machine, into a folder that later runs load from."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amct_lightning.quantizers import functional
from amct_lightning.quantizers.executors import kernels
from amct_lightning.quantizers.executors.cache import cache_folder, cached, digest_of
from amct_lightning.quantizers.executors.kernels import Kernel, KernelModule
from amct_lightning.quantizers.functions import activation, weight

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
"""A kernel: from its inputs to its outputs; no graph is made of it."""

_SOURCES = (functional, activation, weight, kernels, sys.modules[__name__])


def has_compiler(device: str) -> bool:
    """Tell whether kernels for a type of device can be compiled here, as far as can be told without trying.

    Those for CUDA devices have never been run, so they have to be asked for.

    Args:
        device: Type of the device.
    """
    return device == "cpu" and compiler() is not None


def compiler() -> str | None:
    """Return the C++ compiler: that of the variable ``CXX``, or the one that is found."""
    names = os.environ.get("CXX"), "g++", "clang++"
    return next((found for found in (shutil.which(name) for name in names if name) if found), None)


def load(kernel: Kernel) -> Compiled:
    """Return a kernel, from the folder if it is there as it was written, else compiled; that takes some seconds.

    Args:
        kernel: Which one.

    Raises:
        Exception: Whatever Inductor, the compiler or the file system raises if it cannot be had.
    """
    return _loaded(cached(kernel_file(kernel), lambda path: _compile(kernel, path)))


def kernel_file(kernel: Kernel) -> Path:
    """Return where a kernel is kept.

    Args:
        kernel: Which one.
    """
    return cache_folder() / f"{kernel}-{_formulas()}.pt2"


@cache  # the package may be replaced on the disk while a training runs
def _formulas() -> str:
    return digest_of(*(Path(str(module.__file__)).read_text(encoding="utf-8") for module in _SOURCES))


def _compile(kernel: Kernel, path: Path) -> None:
    module = KernelModule(kernel)
    # However many threads there are when it runs.
    configs: dict[str, Any] = {"cpp.dynamic_threads": True, "aot_inductor.compile_wrapper_opt_level": "O1"}
    if kernel.device == "cuda":  # a quotient in the last bit is another code near a tie
        configs["eager_numerics.division_rounding"] = True
    with _Quiet(), torch.no_grad():
        exported = torch.export.export(module, module.examples(), dynamic_shapes=(_axes(module.examples()),))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)


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
