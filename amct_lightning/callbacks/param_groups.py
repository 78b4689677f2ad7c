"""Give the learned clips a parameter group of their own in optimizers that are set up already."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, Optimizer

_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# What torch's schedulers keep per parameter group, beside the groups themselves.
_PER_GROUP_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums")
_SCALED_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")


def move_clips(
    optimizer: Optimizer,
    schedulers: Iterable[Any],
    clips: Iterable[nn.Parameter],
    lr_scale: float,
    weight_decay: float | None,
) -> None:
    """Move the clips out of groups that they share with other parameters, into groups of their own.

    A group that holds nothing but clips was made by the user and stays as it is, and so does one whose settings are
    those that the clips are to have. A new group has the settings of the one it came from, apart from learning rate
    and weight decay; the schedulers follow it like that one. LBFGS takes a single group: its clips are not moved.

    Args:
        optimizer: An optimizer that has not stepped yet.
        schedulers: The learning rate schedulers of this optimizer.
        clips: The clip parameters of the model.
        lr_scale: Factor of the learning rate.
        weight_decay: Weight decay of the clips; ``None`` keeps that of the old group.
    """
    wanted = {id(clip) for clip in clips}
    schedulers = list(schedulers)
    for index, group in enumerate(list(optimizer.param_groups)):
        is_clip = [id(p) in wanted for p in group["params"]]
        has_decay = weight_decay is not None and group.get("weight_decay", weight_decay) != weight_decay
        if not any(is_clip) or all(is_clip) or (lr_scale == 1 and not has_decay):
            continue
        if isinstance(optimizer, LBFGS):
            rank_zero_warn("LBFGS takes one parameter group, so quant_lr_scale does not count for its clips.")
            continue
        optimizer.add_param_group(_split(group, is_clip, lr_scale, weight_decay))
        for scheduler in schedulers:
            _follow(scheduler, index, lr_scale)


def _split(group: dict[str, Any], is_clip: list[bool], lr_scale: float, weight_decay: float | None) -> dict[str, Any]:
    """Take the clips out of ``group`` and return the group they go to."""
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    settings.update({key: settings[key] * lr_scale for key in _LEARNING_RATES if key in settings})
    if weight_decay is not None and "weight_decay" in settings:
        settings["weight_decay"] = weight_decay
    clips: list[Any] = list(compress(group["params"], is_clip))
    keep = [not flag for flag in is_clip]
    group["params"] = list(compress(group["params"], keep))
    if "param_names" in group:  # an optimizer made from named_parameters() wants names again
        clips = list(zip(compress(group["param_names"], is_clip), clips, strict=True))
        group["param_names"] = list(compress(group["param_names"], keep))
    return {"params": clips, **settings}


def _follow(scheduler: Any, index: int, lr_scale: float) -> None:
    """Extend the per-group lists of a scheduler for a new group that behaves like group ``index``."""
    for nested in getattr(scheduler, "_schedulers", ()):
        _follow(nested, index, lr_scale)
    for name in _PER_GROUP_LISTS:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and index < len(values):
            values.append(values[index] * lr_scale if name in _SCALED_LISTS else values[index])
