"""Optimizers around optimizers, also those that leave out ``Optimizer.__init__``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def parts_of(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it works with, from the outside to the inside.

    Args:
        optimizer: An optimizer, or something that is used as one.

    Example:
        >>> import torch
        >>> class Wrapper(Optimizer):
        ...     def __init__(self, inner):  # no super().__init__()
        ...         self.inner, self.param_groups = inner, inner.param_groups
        >>> [type(part).__name__ for part in parts_of(Wrapper(torch.optim.SGD([torch.zeros(1)])))]
        ['Wrapper', 'SGD']
    """
    found = [optimizer]
    for part in found:
        for value in attributes_of(part):
            if isinstance(value, Optimizer) and all(value is not known for known in found):
                found.append(value)
    return found


def add_group(optimizer: Any, group: dict[str, Any], parent: dict[str, Any], before: bool = False) -> None:
    """Add a group to an optimizer and to those of its parts that step its parent.

    ``add_param_group`` is called where an optimizer overrides it, for its own books. The inherited one is not: it reads
    defaults that an optimizer without ``super().__init__()`` may lack, and a group with every setting needs none.

    Args:
        optimizer: The optimizer.
        group: The group, with every setting that its parent has.
        parent: A group of the optimizer.
        before: Whether to put it before its parent, instead of at the end.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1)])
        >>> add_group(sgd, {**sgd.param_groups[0], "params": [torch.ones(1)]}, sgd.param_groups[0])
        >>> [group["params"] for group in sgd.param_groups]
        [[tensor([0.])], [tensor([1.])]]
    """
    override = getattr(type(optimizer), "add_param_group", Optimizer.add_param_group)
    if override is not Optimizer.add_param_group:
        optimizer.add_param_group(_with_pairs(group))
        first = group["params"][0]
        group = next(
            added
            for part in parts_of(optimizer)
            for added in part.param_groups
            if any(parameter is first for parameter in added["params"])
        )
    for part in parts_of(optimizer):
        groups = part.param_groups
        if any(one is parent for one in groups):
            others = [one for one in groups if one is not group]
            place = next(i for i, one in enumerate(others) if one is parent) if before else len(others)
            groups[:] = [*others[:place], group, *others[place:]]


def _with_pairs(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group as ``add_param_group`` takes it: names, if there are any, in pairs with the parameters."""
    settings = {key: value for key, value in group.items() if key != "param_names"}
    if "param_names" in group:
        settings["params"] = list(zip(group["param_names"], group["params"], strict=True))
    return settings


def before_loading(optimizer: Any, call: Callable[[], None]) -> list[RemovableHandle]:
    """Call a function when the state of an optimizer is about to be loaded.

    One that leaves out ``super().__init__()`` has no such hooks, and no use for them: it hands the state on.

    Args:
        optimizer: The optimizer.
        call: The function; it may be called for each part of the optimizer.

    Returns:
        Handles to remove it by.
    """
    hooked = [part for part in parts_of(optimizer) if hasattr(part, "_optimizer_load_state_dict_pre_hooks")]
    return [part.register_load_state_dict_pre_hook(lambda *_: call()) for part in hooked]


def schedulers_of(optimizer: Any, roots: Iterable[Any]) -> list[Any]:
    """Return the schedulers of an optimizer, those inside of other schedulers as well.

    Args:
        optimizer: The optimizer.
        roots: Schedulers, or objects that may be some.

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import ChainedScheduler, StepLR
        >>> sgd = torch.optim.SGD([torch.zeros(1)])
        >>> [type(found).__name__ for found in schedulers_of(sgd, [ChainedScheduler([StepLR(sgd, 1)]), None])]
        ['ChainedScheduler', 'StepLR']
    """
    own = {id(group) for group in optimizer.param_groups}
    queue, found = list(roots), list[Any]()
    for value in queue:
        if _is_scheduler(value) and all(value is not known for known in found):
            queue += attributes_of(value)
            found.append(value)
    return [one for one in found if any(id(group) in own for group in one.optimizer.param_groups)]


def attributes_of(thing: Any) -> list[Any]:
    """Return the attributes of an object, and what is in those that are lists, tuples or dicts.

    Args:
        thing: The object.

    Example:
        >>> from types import SimpleNamespace
        >>> attributes_of(SimpleNamespace(a=1, b=[2, 3]))
        [1, 2, 3]
    """
    found: list[Any] = []
    for value in getattr(thing, "__dict__", {}).values():
        inner = tuple(value.values()) if isinstance(value, dict) else value
        found += inner if isinstance(inner, (list, tuple)) else [inner]
    return found


def _is_scheduler(value: Any) -> bool:
    if isinstance(value, (Optimizer, nn.Module)) or not hasattr(value, "step"):
        return False
    optimizer = getattr(value, "__dict__", {}).get("optimizer")
    return isinstance(getattr(optimizer, "param_groups", None), list)
