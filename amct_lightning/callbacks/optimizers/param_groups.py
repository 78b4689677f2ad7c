"""Give the learned clips a parameter group of their own in optimizers that are set up already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from amct_lightning.modules import QATLayer, learned_factors, quantized_layers

_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# What torch's schedulers keep per parameter group, beside the groups themselves.
_PER_GROUP_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums")
_SCALED_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")


class ClipGroups:
    """Keeps the clips of a model in groups of their own, also when groups are added in the middle of a training.

    Callbacks that unfreeze layers, as Lightning's BaseFinetuning, add a group with the clips among the weights. They
    then join the clips of the optimizer. BaseFinetuning leaves out a parameter whose *value* is that of another one,
    as those of all clips are before their calibration; such clips are taken in too.

    Args:
        model: The converted module.
        lr_scale: Factor of the learning rate.
        weight_decay: Weight decay of the clips; ``None`` keeps that of their group.

    Example:
        >>> import torch
        >>> from amct_lightning import prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), None, torch.ones(1, 2))
        >>> optimizer = torch.optim.AdamW(model[1].parameters(), weight_decay=0.1)
        >>> groups = ClipGroups(model, lr_scale=1.0, weight_decay=0.0)
        >>> groups.begin([optimizer], [])
        >>> optimizer.add_param_group({"params": list(model[0].parameters())})
        >>> groups.follow([optimizer])
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.1), (4, 0.0), (2, 0.1)]
    """

    def __init__(self, model: nn.Module, lr_scale: float, weight_decay: float | None) -> None:
        self._clips = learned_factors(model)
        self._weights = {id(clip): weight for layer in quantized_layers(model).values() for clip, weight in _of(layer)}
        self._lr_scale = lr_scale
        self._weight_decay = weight_decay
        self._counts: list[int] = []
        self._left_out: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def begin(self, optimizers: list[Optimizer], scheduler_configs: Iterable[Any]) -> None:
        """Move the clips in optimizers that have not stepped yet.

        Args:
            optimizers: The optimizers of the training.
            scheduler_configs: Lightning's configurations of the learning rate schedulers.
        """
        schedulers = [config.scheduler for config in scheduler_configs]
        for optimizer in optimizers:
            self._move(optimizer, [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer])
        groups = _group_of(optimizers)
        self._left_out = {key for key, weight in self._weights.items() if key not in groups and id(weight) in groups}
        self._counts = [len(optimizer.param_groups) for optimizer in optimizers]
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer):
                # BaseFinetuning restores its groups after this; they must be in order before the states are loaded.
                hook = optimizer.register_load_state_dict_pre_hook(lambda *_: self.follow(optimizers, loading=True))
                self._handles.append(hook)

    def follow(self, optimizers: list[Optimizer], loading: bool = False) -> None:
        """Take care of groups that were added since.

        Args:
            optimizers: The optimizers of the training.
            loading: Whether their states are about to be loaded.
        """
        if not loading:
            while self._handles:
                self._handles.pop().remove()
        counts = [len(optimizer.param_groups) for optimizer in optimizers]
        if counts == self._counts:
            return
        groups = _group_of(optimizers)
        for clip in self._clips:
            group = groups.get(id(self._weights.get(id(clip))))
            if group is not None and id(clip) not in groups.keys() | self._left_out:
                group["params"].append(clip)
        for optimizer in optimizers:
            self._join(optimizer)
        self._counts = [len(optimizer.param_groups) for optimizer in optimizers]

    def _move(self, optimizer: Optimizer, schedulers: list[Any]) -> None:
        """Move the clips of an optimizer that has not stepped yet into groups of their own.

        A new group has the settings of the one it came from, apart from learning rate and weight decay; the schedulers
        follow it like that one. LBFGS takes a single group: its clips are not moved.
        """
        for index, group, is_clip in self._shared_groups(optimizer):
            if isinstance(optimizer, LBFGS):
                rank_zero_warn("LBFGS takes one parameter group, so quant_lr_scale does not count for its clips.")
                continue
            optimizer.add_param_group(self._split(group, is_clip))
            for scheduler in schedulers:
                _follow(scheduler, index, self._lr_scale)

    def _join(self, optimizer: Optimizer) -> None:
        """Move the clips of an optimizer into the group that there is for clips.

        If there is none yet, one is made before the group they are in: that is the newest, and BackboneFinetuning
        expects it to stay the last.
        """
        wanted = set(map(id, self._clips))
        groups = optimizer.param_groups
        own = next((g for g in groups if g["params"] and all(id(p) in wanted for p in g["params"])), None)
        for index, group, is_clip in self._shared_groups(optimizer):
            new = self._split(group, is_clip)
            if own is None:
                optimizer.add_param_group(new)
                own = groups.pop()
                groups.insert(index, own)
            else:
                own["params"].extend(new["params"])

    def _shared_groups(self, optimizer: Optimizer) -> Iterator[tuple[int, dict[str, Any], list[bool]]]:
        """Yield the groups that clips have to leave: each with its index, and which of its parameters are clips.

        A group that holds nothing but clips was made by the user and stays as it is, and so does one whose settings are
        those that the clips are to have.
        """
        wanted, decay = set(map(id, self._clips)), self._weight_decay
        for index, group in enumerate(list(optimizer.param_groups)):
            is_clip = [id(p) in wanted for p in group["params"]]
            differs = self._lr_scale != 1 or (decay is not None and group.get("weight_decay", decay) != decay)
            if differs and any(is_clip) and not all(is_clip):
                yield index, group, is_clip

    def _split(self, group: dict[str, Any], is_clip: list[bool]) -> dict[str, Any]:
        """Take the clips out of ``group`` and return the group they go to."""
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        settings.update({key: settings[key] * self._lr_scale for key in _LEARNING_RATES if key in settings})
        if self._weight_decay is not None and "weight_decay" in settings:
            settings["weight_decay"] = self._weight_decay
        clips: list[Any] = list(compress(group["params"], is_clip))
        keep = [not flag for flag in is_clip]
        group["params"] = list(compress(group["params"], keep))
        if "param_names" in group:  # an optimizer made from named_parameters() wants names again
            clips = list(zip(compress(group["param_names"], is_clip), clips, strict=True))
            group["param_names"] = list(compress(group["param_names"], keep))
        return {"params": clips, **settings}


def _group_of(optimizers: Iterable[Optimizer]) -> dict[int, dict[str, Any]]:
    return {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _of(layer: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
    """Yield the learned factors of a layer, each with a weight of the layer."""
    weight = next(iter(layer.parameters(recurse=False)))
    layer = cast(QATLayer, layer)
    for name in (*layer.activation_quantizers, *layer.weight_quantizers):
        yield from ((factor, weight) for factor in getattr(layer, name).parameters())


def _follow(scheduler: Any, index: int, lr_scale: float) -> None:
    """Extend the per-group lists of a scheduler for a new group that behaves like group ``index``."""
    for nested in getattr(scheduler, "_schedulers", ()):
        _follow(nested, index, lr_scale)
    for name in _PER_GROUP_LISTS:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and index < len(values):
            values.append(values[index] * lr_scale if name in _SCALED_LISTS else values[index])
