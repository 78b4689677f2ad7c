"""Where in a model the operators run that an exporter's error names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from amct_lightning.export.tracing.signature import FlatCall
from amct_lightning.wording import cut_off

_SHORTEST = 4  # letters of a name that is looked for: "add" and "to" stand in many a sentence


def culprits(call: FlatCall, errors: Iterable[str]) -> str:
    """Say in which modules the operators run that some errors name; empty if they name none.

    Args:
        call: The call of the model, which runs once more.
        errors: The errors.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return torch.linalg.eigvals(x)
        >>> culprits(FlatCall(nn.Sequential(Model()), torch.eye(2)), ["no operator aten::linalg_eigvals"])
        " linalg_eigvals runs in '0' (Model)."
    """
    seen: dict[str, str] = {}
    with ModuleTracker() as tracker, torch.no_grad(), _Functions(tracker, seen), _Operators(tracker, seen):
        call(*call.tensors)
    text = " ".join(errors)
    modules = dict(call.named_modules())
    found = [
        f"{name} runs in {_described(place, modules)}"
        for name, place in seen.items()
        if len(name) >= _SHORTEST and re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", text)
    ]
    return f" {cut_off(found)}." if found else ""


def _described(place: str, modules: dict[str, nn.Module]) -> str:
    kind = type(modules[place]).__name__ if place in modules else ""
    inner = place.removeprefix("run").removeprefix(".")
    return f"'{inner}' ({kind})" if inner else f"the model itself ({kind})"


def _note(name: str, tracker: ModuleTracker, seen: dict[str, str]) -> None:
    parents = [place for place in tracker.parents if place != "Global"]
    innermost = max(parents, key=len, default="")
    # The tracker names modules by the class of the outermost one.
    seen.setdefault(name, innermost.partition(".")[2])


class _Functions(TorchFunctionMode):
    """Notes the functions of torch that a model calls."""

    def __init__(self, tracker: ModuleTracker, seen: dict[str, str]) -> None:
        self._tracker, self._seen = tracker, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note(getattr(func, "__name__", ""), self._tracker, self._seen)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Notes the operators that a model runs."""

    def __init__(self, tracker: ModuleTracker, seen: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker, self._seen = tracker, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note(func._schema.name.rpartition("::")[2], self._tracker, self._seen)
        return func(*args, **(kwargs or {}))
