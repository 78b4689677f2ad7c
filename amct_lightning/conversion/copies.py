"""Copies of a quantized network beside it in a larger module: averages that torch keeps, and teachers in float."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.modules import QATLayer
from amct_lightning.modules.convert import float_parameters
from amct_lightning.quantizers import Quantizer


def convert_averages(whole: nn.Module, root: nn.Module, plan: QuantPlan) -> None:
    """Convert what :class:`torch.optim.swa_utils.AveragedModel` averages of a converted module, in the same way.

    Its update pairs the parameters of both, so they must have the same.

    Args:
        whole: The module that contains both.
        root: The converted module.
        plan: Its plan.
    """
    root_name = next(name for name, module in whole.named_modules() if module is root)
    for copied, original in averaged_copies(whole):
        if any(isinstance(module, QATLayer) for module in copied.modules()):
            continue
        name = next(name for name, module in whole.named_modules() if module is original)
        if original is root or f"{root_name}.".startswith(f"{name}." if name else ""):
            inner = root_name.removeprefix(name).removeprefix(".")
            convert_layers(copied.get_submodule(inner), plan)
            _count_as_copies(copied)
        elif name.startswith(f"{root_name}." if root_name else ""):
            part = plan.within(name.removeprefix(root_name).removeprefix(".") + ".")
            if part.layers:
                convert_layers(copied, part)
                _count_as_copies(copied)


def _count_as_copies(module: nn.Module) -> None:
    for inner in module.modules():
        if isinstance(inner, Quantizer):
            inner.is_copy = True


def averaged_copies(whole: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield what is averaged inside a module, each with the part of the module that it is an average of."""
    averages = [module for module in whole.modules() if isinstance(module, AveragedModel)]
    inside = {inner for average in averages for inner in average.modules()}
    others = [module for module in whole.modules() if module not in inside]
    for average in averages:
        copied: nn.Module = average.module
        shapes = _shapes(copied)
        original = next((m for m in others if type(m) is type(copied) and shapes and _shapes(m) == shapes), None)
        if original is not None:
            yield copied, original


def float_copies(whole: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Find float modules that have just the weights of a module with quantized layers.

    Args:
        whole: The module that contains both.

    Yields:
        Name and module of the copy, name and module of what it is a copy of.
    """
    modules = dict(whole.named_modules())
    quantized = {
        name: module for name, module in modules.items() if any(isinstance(m, QATLayer) for m in module.modules())
    }
    found: list[str] = []
    for name, module in modules.items():
        if name in quantized or any(name.startswith(f"{outer}.") for outer in found):
            continue
        twin = next((other for other, m in quantized.items() if other and _has_weights_of(module, m)), None)
        if twin is not None:
            found.append(name)
            yield name, module, twin, quantized[twin]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's parameters, those of quantizers left out."""
    return {
        f"{path}.{name}": parameter.shape
        for path, inner in module.named_modules()
        if not isinstance(inner, Quantizer)
        for name, parameter in inner.named_parameters(recurse=False)
    }


def _has_weights_of(module: nn.Module, quantized: nn.Module) -> bool:
    if any(isinstance(inner, Quantizer) for inner in module.modules()):
        return False
    own, others = list(module.parameters()), float_parameters(quantized)
    return bool(own) and len(own) == len(others) and all(_is_copy(a, b) for a, b in zip(own, others, strict=True))


def _is_copy(a: Tensor, b: Tensor) -> bool:
    if a is b or a.shape != b.shape or a.device != b.device or a.is_meta:
        return False
    return bool((a == b).all())
