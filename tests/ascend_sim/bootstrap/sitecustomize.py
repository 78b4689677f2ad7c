"""Python imports this at its start where PYTHONPATH says so: `import torch_npu` then works on simulated devices.

The libraries that torch_npu is linked with are loaded right before it, and the dynamic loader finds them by their
names: nothing needs LD_LIBRARY_PATH. The kernels are installed right after it. Nothing is imported before that.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_RUNTIME = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


class _TorchNpuFinder(MetaPathFinder):
    """Finds torch_npu where it is, and wraps its execution."""

    def __init__(self, libraries: Path) -> None:
        self._libraries = libraries

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch_npu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        for name in _RUNTIME:
            ctypes.CDLL(str(self._libraries / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
        execute(module)
        if os.environ.get("SIM_NPU_KERNELS") != "0":
            self._install_kernels()

    def _install_kernels(self) -> None:
        if ctypes.CDLL(str(self._libraries / "libsimops.so")).sim_install_kernels():
            raise ImportError("the kernels of the simulated NPU could not be installed; the reason is on stderr")


def _hide(names: Sequence[str]) -> None:
    """Let packages look as if they were not installed: those that use them where they are there start sooner."""
    from importlib import metadata

    find = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return find(name)

    metadata.distribution = distribution
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # importing None is a ModuleNotFoundError


if "SIM_HIDE" in os.environ:
    _hide(os.environ["SIM_HIDE"].split(","))
if "SIM_NPU_LIBRARIES" in os.environ:
    sys.meta_path.insert(0, _TorchNpuFinder(Path(os.environ["SIM_NPU_LIBRARIES"])))
