"""The libraries of ONNX, which only an export needs, and keeping them and torch's exporters quiet."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch


def need(*names: str, extra: str = "onnx") -> None:
    """Check that libraries are installed.

    Args:
        names: Names of their modules.
        extra: Which extra of the package installs them.

    Raises:
        ModuleNotFoundError: If one is not, with how to install all of them.

    Example:
        >>> need("onnx", "onnx_ir")
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The export needs the package '{name}', which is not installed. "
                f"Install everything for it with: pip install 'amct-lightning[{extra}]'",
                name=name,
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch's exporters say to their own developers from users."""
    logger = logging.getLogger("torch")
    private: Any = torch._C
    level, graphs = logger.level, private._jit_onnx_log
    logger.setLevel(logging.CRITICAL)
    # Private (torch 2.6 to 2.13): with each error of the TorchScript exporter its whole graph is printed, whatever the
    # settings of its log, which the exporter sets itself.
    private._jit_onnx_log = lambda *_: None
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        private._jit_onnx_log = graphs
