"""Reading Lightning checkpoints without Lightning, and without running code from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from amct_lightning.amct.restore import read_checkpoint
from amct_lightning.wording import abbreviated

CHECKPOINT_KEY = "amct_lightning"
"""Entry of a checkpoint that holds the plan, the calibration state and the record."""


class _Foreign:
    """Stands for an object whose class is not loaded; takes whatever the file gives it and does nothing with it."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_foreign_checkpoint(path: str | Path, map_location: Any = "cpu") -> tuple[dict[str, Any], list[str]]:
    """Read a file that ``torch.save`` wrote; objects of other classes than those of tensors come as empty stand-ins.

    Nothing in the file is executed.

    Args:
        path: The file.
        map_location: Where its tensors go, as for ``torch.load``.

    Returns:
        Its content, and the names of the classes that have a stand-in.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
        RuntimeError: If it is not a checkpoint, damaged, or cannot be read even so.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.ckpt"
        >>> torch.save({"loss": torch.nn.Identity(), "weight": torch.ones(1)}, path)
        >>> content, foreign = read_foreign_checkpoint(path)
        >>> content["weight"], foreign
        (tensor([1.]), ['torch.nn.modules.linear.Identity'])
    """
    try:
        return read_checkpoint(path, map_location), []
    except RuntimeError:
        foreign = _foreign_names(path)
        if not foreign:
            raise
    try:
        with torch.serialization.safe_globals([_stand_in(name) for name in foreign]):
            return read_checkpoint(path, map_location), foreign
    except RuntimeError as error:
        raise RuntimeError(
            f"'{path}' cannot be read without running code from it: it holds objects of {abbreviated(foreign)} that "
            "cannot be left out. If you trust the file, read it with torch.load(..., weights_only=False), delete what "
            "holds them (often 'hyper_parameters') and save it again."
        ) from error


def is_foreign(value: object) -> bool:
    """Tell whether a value is a stand-in of :func:`read_foreign_checkpoint`, or the class of one.

    Args:
        value: The value.

    Example:
        >>> is_foreign(3)
        False
    """
    return isinstance(value, _Foreign) or (isinstance(value, type) and issubclass(value, _Foreign))


def _foreign_names(path: str | Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no checkpoint at all; what is wrong with it was found when reading it
        return []


def _stand_in(name: str) -> type[_Foreign]:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (_Foreign,), {"__module__": module, "__qualname__": qualname})
