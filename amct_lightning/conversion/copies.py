"""Copies of a quantized network beside it in a larger module: averages that torch keeps, and teachers in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
    alike: dict[_Signature, list[str]] = {}
    for name, module in quantized.items():
        if name:
            alike.setdefault(_signature(float_parameters(module)), []).append(name)
    by_first: dict[_Signature, dict[tuple[float, ...], list[str]]] = {}
    found: list[str] = []
    for name, module in modules.items():
        if name in quantized or any(name.startswith(f"{outer}.") for outer in found):
            continue
        own, signature = list(module.parameters()), _signature(module.parameters())
        if not own or signature not in alike or any(isinstance(inner, Quantizer) for inner in module.modules()):
            continue
        # The first value tells most layers of one shape apart: the host waits once for each, and not for each pair.
        if signature not in by_first:
            by_first[signature] = {}
            for other in alike[signature]:
                by_first[signature].setdefault(_first(float_parameters(quantized[other])), []).append(other)
        others = by_first[signature].get(_first(own), [])
        twin = next((other for other in others if _are_copies(own, float_parameters(quantized[other]))), None)
        if twin is not None:
            found.append(name)
            yield name, module, twin, quantized[twin]


_Signature = tuple[tuple[torch.Size, torch.device, bool], ...]


def _signature(parameters: Iterable[Tensor]) -> _Signature:
    return tuple((parameter.shape, parameter.device, isinstance(parameter, DTensor)) for parameter in parameters)


def _first(parameters: Sequence[Tensor]) -> tuple[float, ...]:
    first = parameters[0]
    if first.is_meta or isinstance(first, DTensor):
        return ()
    return tuple(first.detach().flatten()[:1].tolist())


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's parameters, those of quantizers left out."""
    return {
        f"{path}.{name}": parameter.shape
        for path, inner in module.named_modules()
        if not isinstance(inner, Quantizer)
        for name, parameter in inner.named_parameters(recurse=False)
    }


def _are_copies(own: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Tell whether two modules of one signature have other parameters with the same values."""
    if any(a is b or a.is_meta for a, b in zip(own, others, strict=True)):
        return False
    return all(bool((a == b).all()) for a, b in zip(own, others, strict=True))
