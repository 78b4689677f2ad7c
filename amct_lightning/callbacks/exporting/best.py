"""A copy of a trained module as its best checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from amct_lightning.checkpoint_file import read_foreign_checkpoint
from amct_lightning.files import is_file
from amct_lightning.graph.forward import copy_to_run


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        module: A copy of the LightningModule, in eval mode.
        source: Where its weights come from, for people.
    """

    module: pl.LightningModule
    source: str


def best_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Trained:
    """Return a copy of the module with the weights of the best checkpoint, or those that it has at the end.

    Args:
        trainer: The Trainer, after a training.
        pl_module: The module; it is not changed.

    Raises:
        RuntimeError: If the module cannot be copied, or the checkpoint not be loaded.
    """
    copied = copy_to_run(pl_module, share_parameters=False)
    if not isinstance(copied, pl.LightningModule):
        raise RuntimeError(f"{type(pl_module).__name__} cannot be copied, and the model itself is not to be changed.")
    path = best_checkpoint(trainer)
    if path is None:
        return Trained(copied.eval(), "the weights at the end of the training")
    checkpoint, _ = read_foreign_checkpoint(path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise RuntimeError(f"The best checkpoint '{path}' has no state_dict.")
    nn.Module.load_state_dict(copied, state, strict=pl_module.strict_loading)
    return Trained(copied.eval(), f"the best checkpoint '{path}'")


def best_checkpoint(trainer: pl.Trainer) -> str | None:
    """Return the best checkpoint of a training that monitors something and has saved one, as a single local file."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if path and getattr(callback, "monitor", None) is not None and is_file(path) and Path(path).is_file():
            return str(path)
    return None
