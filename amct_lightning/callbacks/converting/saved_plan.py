"""The plan in a checkpoint that a Trainer is about to load, so that the model can be converted without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl

from amct_lightning.checkpoint_file import CHECKPOINT_KEY, read_foreign_checkpoint

_META = "meta.pt"  # what a sharded checkpoint of Lightning (2.5, 2.6), a folder, has beside its tensors


def checkpoint_to_load(trainer: pl.Trainer) -> str | Path | None:
    """Return the checkpoint that a Trainer in its setup phase is about to load, if any.

    Private in Lightning (seen in 2.5 and 2.6): before it reads the checkpoint, and after that the model must have its
    final structure, nothing but an argument of ``Trainer._run`` knows it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return cast("str | Path | None", frame.f_locals.get("ckpt_path"))
        frame = frame.f_back
    return None


def saved_entry(path: str | Path | None) -> dict[str, Any] | None:
    """Return what :class:`QuantRetrainCallback` has put into a checkpoint, its tensors without values.

    Args:
        path: The checkpoint, a file or a folder.

    Returns:
        The entry; ``None`` without a checkpoint, and for one that has none or cannot be read here, which is left to
        whoever loads it.
    """
    if path is None:
        return None
    local = Path(path, _META) if Path(path).is_dir() else Path(path)
    try:
        checkpoint, _ = read_foreign_checkpoint(local, map_location="meta")
    except (OSError, RuntimeError):
        return None
    entry = checkpoint.get(CHECKPOINT_KEY)
    return entry if isinstance(entry, dict) and "plan" in entry else None
