"""The learning rate of a group of clips: always that of the group they came from, times a factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What torch's schedulers, and those written after them, keep per parameter group, beside the groups themselves.
_RATES = ("lrs", "_lr")
_OTHERS = ("lambdas", "momentums")


def extend_scheduler(scheduler: Any, index: int, groups: int, factor: float) -> None:
    """Extend the per-group lists of a scheduler for a new group that behaves like group ``index``.

    Args:
        scheduler: The scheduler.
        index: Number of the group that the new one is like.
        groups: Number of groups before it was added.
        factor: Factor of its learning rate.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
        >>> extend_scheduler(scheduler, 0, 1, factor=0.1)
        >>> scheduler.base_lrs
        [0.5, 0.05]
    """
    for name, values in vars(scheduler).items():
        if isinstance(values, list) and len(values) == groups and name.endswith(_RATES + _OTHERS):
            values.append(values[index] * factor if name.endswith(_RATES) else values[index])


class Rates:
    """Keeps the rate of groups of clips at that of the groups they came from, times a factor.

    Schedulers that hold one value per group they knew, and code that writes ``lr`` into the groups it made, know
    nothing of a group that was added. So its rate is taken from its parent right before it is used.

    Args:
        factor: The factor.

    Example:
        >>> weight, clip = torch.zeros(2, 2), torch.zeros(())
        >>> sgd = torch.optim.SGD([{"params": [weight]}, {"params": [clip]}], lr=1.0)
        >>> rates = Rates(factor=0.5)
        >>> rates.tie(sgd.param_groups[1], sgd.param_groups[0])
        >>> for group in sgd.param_groups[:1]:
        ...     group["lr"] = 0.1
        >>> rates.derive(sgd)
        >>> [group["lr"] for group in sgd.param_groups]
        [0.1, 0.05]
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        # By parameters: loading the state of an optimizer makes new groups.
        self._parents: dict[int, Any] = {}
        self._versions: dict[int, tuple[int, int, int]] = {}

    def tie(self, group: dict[str, Any], parent: dict[str, Any]) -> None:
        """Let a group follow another one.

        Args:
            group: The group; it has clips only.
            parent: The group that it follows; it has other parameters.
        """
        self._parents[id(group["params"][0])] = parent["params"][0]

    def derive(self, optimizer: Any) -> None:
        """Set the rates of the groups that follow others.

        Args:
            optimizer: Their optimizer.
        """
        groups = optimizer.param_groups
        for group in groups:
            parent = self._parents.get(id(group["params"][0])) if group["params"] else None
            if parent is not None:
                source = next((one for one in groups if any(p is parent for p in one["params"])), None)
                if source is not None and "lr" in source:
                    self._copy(source["lr"], group)

    def _copy(self, rate: Any, group: dict[str, Any]) -> None:
        own = group["lr"]
        if not isinstance(rate, Tensor) or not isinstance(own, Tensor) or own is rate:
            group["lr"] = rate * self._factor
        elif self._versions.get(id(own)) != (id(rate), rate._version, own._version):
            # In place, for the sake of CUDA graphs; and not in every step, for which it would be an operator more.
            torch.mul(rate, self._factor, out=own)
            self._versions[id(own)] = id(rate), rate._version, own._version
