"""The operators that run a quantized layer: compiled against torch, and registered with it, when first needed."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from amct_lightning.quantizers.executors.cache import cache_folder, cached, digest_of
from amct_lightning.quantizers.executors.native.library import FLAGS, compile_library, sources_of

_SOURCES = sources_of("layer.cpp", "product.h", "training.h", "activations.h", "weights.h", "numbers.h")

_LOG = logging.getLogger(__name__)


@cache
def layer_operator(name: str) -> Callable[..., Tensor] | None:
    """Return an operator, or ``None`` if it cannot be compiled here: then each of its parts is run by itself.

    Args:
        name: ``"quantized_product"``, or ``"with_backward"`` for an output that is there already.
    """
    if not _is_loaded():
        return None
    operator: Callable[..., Tensor] = getattr(torch.ops.amct_lightning, name).default
    return operator


@cache
def _is_loaded() -> bool:
    try:
        torch.ops.load_library(str(cached(extension_file(), _compile)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        _LOG.warning("Quantized layers run without their operator in C++ (%s: %s).", type(error).__name__, line)
        return False
    return True


def extension_file() -> Path:
    """Return where the operator is kept; ``cache_folder`` is another one for another version of torch."""
    texts = [source.read_text(encoding="utf-8") for source in _SOURCES]
    return cache_folder() / f"layer-{digest_of(*texts, FLAGS)}.so"


def _compile(path: Path) -> None:
    folders = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    compile_library(_SOURCES[0], path, [*folders, abi, *libraries])
