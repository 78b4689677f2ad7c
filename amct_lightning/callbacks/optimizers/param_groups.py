"""Give the learned clips a parameter group of their own in optimizers that are set up already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, compress, count
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from amct_lightning.callbacks.checks import warn_left_out
from amct_lightning.callbacks.optimizers.rates import Rates, extend_scheduler
from amct_lightning.callbacks.optimizers.wrapped import add_group, attributes_of, before_loading, schedulers_of
from amct_lightning.modules import QATLayer, learned_factors, quantized_layers

_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


class ClipGroups:
    """Keeps the clips of a model in groups of their own, also when groups are added in the middle of a training.

    Callbacks that unfreeze layers, as Lightning's BaseFinetuning, add a group with the clips among the weights. They
    then join the clips of the optimizer. BaseFinetuning leaves out a parameter whose *value* is that of another one,
    as those of all clips are before their calibration; such clips are taken in too.

    Args:
        model: The converted module.
        lr_scale: Factor of the learning rate.
        weight_decay: Weight decay of the clips; ``None`` keeps that of their group.

    Attributes:
        clips: The learned clips.

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
        self.clips = learned_factors(model)
        self._kin = {id(kin.clip): kin for layer in quantized_layers(model).values() for kin in _of(layer)}
        self._lr_scale = lr_scale
        self._rates = Rates(lr_scale)
        self._weight_decay = weight_decay
        self._counts: list[int] = []
        self._left_out: set[int] = set()
        self._handles: list[RemovableHandle] = []

    @classmethod
    def of(cls, trainer: pl.Trainer, model: nn.Module, lr_scale: float, weight_decay: float | None) -> ClipGroups:
        """Move the clips in the optimizers of a Trainer, and warn of those that are in none.

        Args:
            trainer: The Trainer, its optimizers not stepped yet.
            model: The converted module.
            lr_scale: Factor of the learning rate.
            weight_decay: Weight decay of the clips; ``None`` keeps that of their group.
        """
        groups = cls(model, lr_scale, weight_decay)
        # The schedulers that Lightning steps, and any that the LightningModule keeps to itself.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        groups.begin(trainer.optimizers, [*schedulers, *attributes_of(trainer.lightning_module)])
        warn_left_out(trainer.optimizers, groups.clips)
        return groups

    def begin(self, optimizers: list[Optimizer], roots: Iterable[Any]) -> None:
        """Move the clips in optimizers that have not stepped yet.

        Args:
            optimizers: The optimizers of the training.
            roots: The schedulers of their learning rates; other objects among them do no harm.
        """
        roots = list(roots)
        for optimizer in optimizers:
            self._move(optimizer, schedulers_of(optimizer, roots))
        groups = _group_of(optimizers)
        self._left_out = {key for key, kin in self._kin.items() if key not in groups and id(kin.weight) in groups}
        self._counts = [len(optimizer.param_groups) for optimizer in optimizers]
        for optimizer in optimizers:
            # BaseFinetuning restores its groups after this; they must be in order before the states are loaded.
            self._handles += before_loading(optimizer, lambda: self.follow(optimizers, loading=True))

    def follow(self, optimizers: list[Optimizer], loading: bool = False) -> None:
        """Take care of groups that were added since, and of rates that have changed.

        Args:
            optimizers: The optimizers of the training.
            loading: Whether their states are about to be loaded.
        """
        if not loading:
            while self._handles:
                self._handles.pop().remove()
        counts = [len(optimizer.param_groups) for optimizer in optimizers]
        if counts != self._counts:
            self._take_in(optimizers)
            self._counts = [len(optimizer.param_groups) for optimizer in optimizers]
        if not loading:
            self.derive(optimizers)

    def derive(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the rates of the clips to those of the groups that they came from, times the factor.

        Args:
            optimizers: The optimizers.
        """
        for optimizer in optimizers:
            self._rates.derive(optimizer)

    def _take_in(self, optimizers: list[Optimizer]) -> None:
        """Let clips join the optimizer of their weights, which was added since, and then the other clips there."""
        groups = _group_of(optimizers)
        for clip in self.clips:
            kin = self._kin.get(id(clip))
            group = None if kin is None else groups.get(id(kin.weight))
            if kin is not None and group is not None and id(clip) not in groups.keys() | self._left_out:
                if "param_names" in group:
                    group["param_names"].append(kin.named_like(group))
                group["params"].append(clip)
        for optimizer in optimizers:
            self._join(optimizer)

    def _move(self, optimizer: Optimizer, schedulers: list[Any]) -> None:
        """Move the clips of an optimizer that has not stepped yet into groups of their own.

        A new group has the settings of the one it came from, apart from learning rate and weight decay; the schedulers
        follow it like that one. LBFGS takes a single group: its clips are not moved.
        """
        for index, group, is_clip in self._shared_groups(optimizer):
            if isinstance(optimizer, LBFGS):
                rank_zero_warn("LBFGS takes one parameter group, so quant_lr_scale does not count for its clips.")
                continue
            before = len(optimizer.param_groups)
            self._add(optimizer, group, is_clip)
            for scheduler in schedulers:
                extend_scheduler(scheduler, index, before, self._lr_scale)

    def _join(self, optimizer: Optimizer) -> None:
        """Move the clips of an optimizer into the group that there is for clips.

        If there is none yet, one is made before the group they are in: that is the newest, and BackboneFinetuning
        expects it to stay the last.
        """
        wanted = set(map(id, self.clips))
        groups = optimizer.param_groups
        own = next((g for g in groups if g["params"] and all(id(p) in wanted for p in g["params"])), None)
        for _, group, is_clip in self._shared_groups(optimizer):
            if own is None:
                own = self._add(optimizer, group, is_clip, before=True)
                continue
            new = self._split(optimizer, group, is_clip)
            own["params"].extend(new["params"])
            if "param_names" in new and "param_names" in own:
                own["param_names"].extend(new["param_names"])

    def _add(
        self, optimizer: Optimizer, parent: dict[str, Any], is_clip: list[bool], before: bool = False
    ) -> dict[str, Any]:
        """Give the clips of a group one of their own, and return it."""
        new = self._split(optimizer, parent, is_clip)
        self._rates.tie(new, parent)
        add_group(optimizer, new, parent, before)
        return _group_of([optimizer])[id(new["params"][0])]

    def _shared_groups(self, optimizer: Optimizer) -> Iterator[tuple[int, dict[str, Any], list[bool]]]:
        """Yield the groups that clips have to leave: each with its index, and which of its parameters are clips.

        A group that holds nothing but clips was made by the user and stays as it is, and so does one whose settings are
        those that the clips are to have.
        """
        wanted, decay = set(map(id, self.clips)), self._weight_decay
        for index, group in enumerate(list(optimizer.param_groups)):
            is_clip = [id(p) in wanted for p in group["params"]]
            differs = self._lr_scale != 1 or (decay is not None and group.get("weight_decay", decay) != decay)
            if differs and any(is_clip) and not all(is_clip):
                yield index, group, is_clip

    def _split(self, optimizer: Optimizer, group: dict[str, Any], is_clip: list[bool]) -> dict[str, Any]:
        """Take the clips out of ``group`` and return the group they go to."""
        new = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        new.update({key: new[key] * self._lr_scale for key in _LEARNING_RATES if key in new})
        if self._weight_decay is not None and "weight_decay" in new:
            new["weight_decay"] = self._weight_decay
        if isinstance(new.get("name"), str):  # LearningRateMonitor takes no two groups of one name
            new["name"] = _unique(f"{new['name']}/quant", {one.get("name") for one in optimizer.param_groups})
        keep = [not flag for flag in is_clip]
        for key in {"params", "param_names"} & group.keys():  # names: of an optimizer made from named_parameters()
            new[key] = list(compress(group[key], is_clip))
            group[key] = list(compress(group[key], keep))
        return new


@dataclass(frozen=True)
class _Kin:
    """A learned factor of a layer, and a weight of it; with their names in the layer."""

    clip: nn.Parameter
    clip_name: str
    weight: nn.Parameter
    weight_name: str

    def named_like(self, group: dict[str, Any]) -> str:
        """Return the name of the factor, as a group names the weight."""
        place = next(place for place, parameter in enumerate(group["params"]) if parameter is self.weight)
        return str(group["param_names"][place]).removesuffix(self.weight_name) + self.clip_name


def _group_of(optimizers: Iterable[Optimizer]) -> dict[int, dict[str, Any]]:
    return {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _of(layer: nn.Module) -> Iterable[_Kin]:
    """Yield the learned factors of a layer."""
    weight_name, weight = next(iter(layer.named_parameters(recurse=False)))
    layer = cast(QATLayer, layer)
    for part in (*layer.activation_quantizers, *layer.weight_quantizers):
        for name, factor in getattr(layer, part).named_parameters():
            yield _Kin(factor, f"{part}.{name}", weight, weight_name)


def _unique(name: str, taken: set[Any]) -> str:
    """Return a name that is not taken, with a number behind it if need be."""
    return next(one for one in chain([name], (f"{name}{number}" for number in count(2))) if one not in taken)
