"""Which executor runs a layer: the one that was asked for, or the fastest that works on its device."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Literal, get_args

from amct_lightning.quantizers.executors import build
from amct_lightning.quantizers.executors.base import COMPOSITE, Executor
from amct_lightning.quantizers.executors.compiled import CompiledExecutor
from amct_lightning.quantizers.executors.kernels import Kernel, KernelModule
from amct_lightning.quantizers.executors.native import NativeExecutor, native_kernel

Execution = Literal["auto", "composite", "compiled", "integer"]
"""What runs quantized layers; ``"auto"`` is ``"compiled"`` where a compiler is found.

``"integer"`` computes the products of the forward in integers; its quantizers run as ``"auto"`` would run them.
"""

ENVIRONMENT = "AMCT_LIGHTNING_EXECUTION"
"""The variable that says what ``"auto"`` is."""

_COMPILED_FOR = ("cpu", "cuda")

_LOG = logging.getLogger(__name__)


def check_execution(execution: str, where: str) -> None:
    """Refuse what is no :data:`Execution`.

    Args:
        execution: The value.
        where: Whose argument it is, for the message.
    """
    if execution not in get_args(Execution):
        raise ValueError(f"{where}(execution={execution!r}): must be one of {', '.join(get_args(Execution))}.")


def resolved(execution: str, device: str) -> str:
    """Return what runs the layers on a type of device.

    Args:
        execution: One of :data:`Execution`.
        device: Type of the device.

    Example:
        >>> resolved("composite", "cpu")
        'composite'
    """
    if execution == "auto":
        execution = os.environ.get(ENVIRONMENT) or "auto"
        check_execution(execution, ENVIRONMENT)
    if execution == "auto":
        return "compiled" if build.has_compiler(device) else "composite"
    return "composite" if execution == "compiled" and device not in _COMPILED_FOR else execution


@cache
def executor_for(execution: str, device: str) -> Executor:
    """Return what runs the layers on a type of device; in a process it is the same one for all of them.

    Args:
        execution: One of :data:`Execution`.
        device: Type of the device.
    """
    name = resolved(execution, device)
    if execution == "compiled" != name:
        _LOG.warning("There are no compiled kernels for devices of type '%s': quantization runs as '%s'.", device, name)
    if name == "integer":
        name = resolved("auto", device)
    compiled = name == "compiled" or (name == "integer" and build.has_compiler(device))
    if not compiled:
        return COMPOSITE
    return (NativeExecutor if device == "cpu" else CompiledExecutor)(_kernel)


@cache  # executors of several names share it, and what went wrong is said once
def _kernel(kernel: Kernel) -> build.Compiled:
    native = native_kernel(kernel)
    if native is not None:
        return native
    try:
        return build.load(kernel)
    except Exception as error:  # whatever is wrong with a compiler must not end a training
        line = str(error).strip().partition("\n")[0]
        _LOG.warning("Quantization runs without the kernel %s (%s: %s).", kernel, type(error).__name__, line)
        module = KernelModule(kernel)
        return lambda tensors: module(*tensors)
