"""Which modules are taught: those whose calls count, and the layers that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import lightning.pytorch as pl
from torch import nn

from amct_lightning.callbacks.checks import find_submodule
from amct_lightning.modules import QATLayer, quantized_layers
from amct_lightning.wording import abbreviated, closest


def chosen_module(pl_module: nn.Module, name: str) -> nn.Module:
    """Return the module that the user has named as the one to teach.

    Args:
        pl_module: The LightningModule.
        name: Dotted name, empty for itself.

    Raises:
        ValueError: If there is no such module.
    """
    modules: dict[str, nn.Module] = dict(pl_module.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(
            f"Distill(module='{name}'): {type(pl_module).__name__} has no such module.{closest(name, modules)} Its "
            f"children are {abbreviated(child for child, _ in pl_module.named_children()) or 'none'}."
        )
    return modules[name]


def taught_modules(pl_module: pl.LightningModule, model: nn.Module, name: str | None) -> list[str]:
    """Return the dotted names of the modules whose calls are taught, each inside of those before it.

    Args:
        pl_module: The LightningModule.
        model: The converted module, it or a part of it.
        name: The one that the user wants, ``None`` for all that hold every quantized layer.

    Raises:
        ValueError: If there is no such module.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> import torch
        >>> module = pl.LightningModule()
        >>> module.net = prepare_qat(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, torch.ones(1, 2))
        >>> taught_modules(module, module.net, None)
        ['net']
    """
    own = {id(layer) for layer in quantized_layers(model).values()}
    quantized = [layer for layer, module in pl_module.named_modules() if id(module) in own]
    if name is not None:
        if not any(layer == name or not name or layer.startswith(f"{name}.") for layer in quantized):
            raise ValueError(
                f"Distill(module='{name}'): there is no quantized layer in it, so it has nothing to learn. The "
                f"quantized layers are {abbreviated(quantized)}."
            )
        return [name]
    common = [*zip(*(layer.split(".") for layer in quantized), strict=False)]
    depth = next((i for i, parts in enumerate(common) if len(set(parts)) > 1), len(common))
    path = quantized[0].split(".")[:depth] if quantized else []
    outer = [".".join(path[:length]) for length in range(len(path) + 1)]
    found = [one for one in outer if _can_be_called(find_submodule(pl_module, one or None))]
    if not found:
        raise ValueError(
            f"Distillation: no module of {type(pl_module).__name__} with a forward holds all quantized layers "
            f"({abbreviated(quantized)}), so it cannot be told whose output to compare. Name one of its parts: "
            "Distill(module='net')."
        )
    return found


def _can_be_called(module: nn.Module) -> bool:
    own = type(module).forward
    return own is not pl.LightningModule.forward and getattr(own, "__name__", "") != "_forward_unimplemented"


def taught_layers(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers that are compared, by name.

    A pattern is for quantized layers, or, if it fits none of them, for any modules; an exact name for that module.

    Args:
        model: The converted module, where names begin.
        patterns: The patterns.

    Raises:
        ValueError: If a pattern fits nothing.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> import torch
        >>> layers = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]
        >>> model = prepare_qat(nn.Sequential(*layers), None, torch.ones(1, 2))
        >>> list(taught_layers(model, ["1.*"])), list(taught_layers(model, ["?"]))
        (['1.0'], ['0', '1'])
    """
    modules = {name: module for name, module in model.named_modules() if name and "_quantizer" not in name}
    quantized = {name: module for name, module in modules.items() if isinstance(module, QATLayer)}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = [pattern] if pattern in modules else _fitting(quantized, pattern) or _fitting(modules, pattern)
        if not fitting:
            raise ValueError(
                f"Distill(layers=...): the pattern '{pattern}' fits no layer of {type(model).__name__}."
                f"{closest(pattern, modules)} The quantized layers are {abbreviated(quantized)}."
            )
        found |= {name: modules[name] for name in fitting}
    return found


def _fitting(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    return [name for name in modules if fnmatchcase(name, pattern)]
