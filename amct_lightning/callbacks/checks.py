"""What the callback checks and says: its arguments, its place in the Trainer, and plans that do not agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from amct_lightning.config import QuantChoices, RetrainConfig
from amct_lightning.graph.plan import QuantPlan


def find_submodule(pl_module: pl.LightningModule, name: str | None) -> nn.Module:
    """Return the part of a LightningModule with a dotted name, all of it for ``None``."""
    if name is None:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(f"'{child}'" for child, _ in pl_module.named_children())
        raise ValueError(
            f"QuantRetrainCallback(submodule='{name}'): {type(pl_module).__name__} has no such module. "
            f"Its children are {known or 'none'}."
        ) from None


def refuse_second(callbacks: Iterable[object], callback: object) -> None:
    """Refuse a Trainer with two callbacks of this kind: they would write one record."""
    if any(type(other) is type(callback) and other is not callback for other in callbacks):
        raise ValueError(
            "The Trainer has two QuantRetrainCallbacks. Use one; to quantize several parts of a LightningModule, "
            "convert all of it and disable the other layers in the config."
        )


def check_arguments(
    config: object, input_data: object, lr_scale: object, weight_decay: object, on_nonfinite: object
) -> None:
    """Refuse arguments of the callback that have a wrong type or value."""
    if config is not None and not isinstance(config, (str, Path, RetrainConfig, QuantChoices, Mapping)):
        raise TypeError(
            "QuantRetrainCallback(config=...) must be the path of a .json, .cfg or .yaml file, a dict, RetrainConfig, "
            f"QuantChoices or None, got {type(config).__name__}."
        )
    if input_data is not None and not isinstance(input_data, (Tensor, tuple, Mapping)):
        raise TypeError(
            "QuantRetrainCallback(input_data=...) must be a tensor, a tuple of positional or a dict of keyword "
            f"arguments, got {type(input_data).__name__}."
        )
    for name, value in (("quant_lr_scale", lr_scale), ("quant_weight_decay", weight_decay)):
        if value is None and name == "quant_weight_decay":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"QuantRetrainCallback({name}={value!r}): must be a finite number >= 0.")
    if on_nonfinite not in ("warn", "raise"):
        raise ValueError(f"QuantRetrainCallback(on_nonfinite={on_nonfinite!r}): must be 'warn' or 'raise'.")


def warn_left_out(optimizers: Iterable[torch.optim.Optimizer], clips: list[nn.Parameter]) -> None:
    """Warn of clips that no optimizer trains."""
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    left_out = sum(id(clip) not in known for clip in clips)
    if left_out and known:
        rank_zero_warn(
            f"{left_out} of {len(clips)} learned clip values are in no optimizer and stay as calibrated. Make the "
            "optimizer in configure_optimizers() from self.parameters() to train them."
        )


def describe_difference(model: QuantPlan, checkpoint: QuantPlan) -> str:
    """Say in what two plans differ."""
    for name in dict.fromkeys([*model.config, *checkpoint.config]):
        if model.config.get(name) != checkpoint.config.get(name):
            return f"layer '{name}' is {checkpoint.config.get(name)} there and {model.config.get(name)} here"
    if model.config != checkpoint.config:
        return (
            f"batch_num or precision mode differ ({checkpoint.config.batch_num} there, {model.config.batch_num} here)"
        )
    return "the data flow between the layers is not the same"
