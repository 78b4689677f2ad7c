"""The libraries of ONNX, which only an export needs, and keeping them and torch's exporters quiet."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO


def need(*names: str) -> None:
    """Check that libraries are installed.

    Args:
        names: Names of their modules.

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
                "Install everything for ONNX with: pip install 'amct-lightning[onnx]'",
                name=name,
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch's exporters say to their own developers from users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # a graph is printed with each error
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
