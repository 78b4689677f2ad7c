"""What AMCT's functions refuse in their arguments, in AMCT's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amct_lightning.files import location


def check_arguments(function: str, model: object, input_data: object, texts: Mapping[str, tuple[object, Any]]) -> None:
    """Refuse arguments of the wrong type.

    Args:
        function: The name of the function.
        model: Its argument ``model``.
        input_data: Its argument ``input_data``.
        texts: Its other arguments by name, and the types that each may have.
    """
    for argument, (value, allowed) in {"model": (model, nn.Module), **texts}.items():
        if not isinstance(value, allowed):
            raise TypeError(f"Func {function} argument {argument} must be {allowed}, got {type(value)}.")
    if not isinstance(input_data, (Tensor, tuple, Mapping)):
        raise RuntimeError(
            f"input data type must be tuple or torch.Tensor! Got {type(input_data).__name__}; a tuple holds the "
            "positional arguments of the model's forward, a dict its keyword arguments."
        )


def refuse_same_file(record_file: str, other: str, what: str) -> None:
    """Refuse a record file that is another file of the call, which would be overwritten.

    Args:
        record_file: The record file.
        other: The other file.
        what: What that one is.
    """
    if Path(location(record_file)).resolve() == Path(location(other)).resolve():
        raise ValueError(
            f"record_file '{record_file}' is the {what}, which would be overwritten. Give the record a path of its own."
        )
