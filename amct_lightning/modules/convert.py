"""What a conversion has put into a model: finding it, and keeping ``DistributedDataParallel`` from sending it around.

The conversion itself is in ``conversion/convert.py``, that of a single layer in ``layers.py``.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, Quantizer

PLAN_ATTRIBUTE = "_amct_quant_plan"
"""Where a converted model keeps its plan."""

# What DDP (torch 1.7 to 2.13) leaves alone in the module that it wraps: a prototype of torch, without a public name.
_LEFT_OUT = "_ddp_params_and_buffers_to_ignore"


def leave_out_of_broadcast(model: nn.Module) -> None:
    """Spare ``DistributedDataParallel`` the buffers of the quantizers, which it would send around before every forward.

    They follow from parameters and calibrated ranges, which are equal in all processes, so nobody needs to send them.
    With them, a model without buffers of its own would have two collectives more in every step than in float.

    Args:
        model: A converted model, or the module around one that is to be wrapped.

    Example:
        >>> import torch
        >>> from amct_lightning import prepare_qat
        >>> model = nn.Sequential(prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4)))
        >>> leave_out_of_broadcast(model)
        >>> "0.0.weight_quantizer.scale" in model._ddp_params_and_buffers_to_ignore
        True
    """
    # A quantizer that layers share has a name in each of them, and any of these may be the one that DDP looks for.
    names = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Quantizer)
        for name in module._buffers
    ]
    present = {name for name, _ in (*model.named_parameters(), *model.named_buffers())} - set(names)
    others = [name for name in getattr(model, _LEFT_OUT, ()) if name in present]
    setattr(model, _LEFT_OUT, [*others, *names])


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantized layers of a model by name.

    Layers of a copy beside the model, such as the teacher that was copied from a quantized student, are not of it.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        Name -> layer, in ``named_modules()`` order; each has ``input_quantizer`` and ``weight_quantizer``.

    Example:
        >>> quantized_layers(nn.Linear(2, 2))
        {}
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, QATLayer)}
    roots = [module for module in modules.values() if PLAN_ATTRIBUTE in module.__dict__]
    planned = {layer for root in roots for layer in _planned_layers(root, is_first=root is roots[0])}
    return {name: layer for name, layer in layers.items() if layer in planned or not roots}


def _planned_layers(root: nn.Module, is_first: bool) -> list[nn.Module]:
    """Return the quantized layers of a converted module, none if it is a copy of another one."""
    layers = [_submodule(root, layer.name) for layer in root.__dict__[PLAN_ATTRIBUTE].layers]
    found = [layer for layer in layers if isinstance(layer, QATLayer)]
    is_copy = any(layer.input_quantizer.is_copy for layer in found)
    return [] if is_copy and not is_first else list(found)


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name, if it is still there."""
    found: nn.Module | None = root
    for part in name.split(".") if name else ():
        found = None if found is None else found._modules.get(part)
    return found


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers of a model, a shared one once.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        Name -> quantizer: the (first) layer's name, with `` (hidden state)`` for a recurrent layer's second one.
    """
    found: dict[str, ActivationQuantizer] = {}
    seen: set[int] = set()
    for name, module in quantized_layers(model).items():
        for attribute in cast(QATLayer, module).activation_quantizers:
            quantizer = cast(QATLayer, module).get_quantizer(attribute)
            if id(quantizer) not in seen:
                seen.add(id(quantizer))
                found[name if attribute == "input_quantizer" else f"{name} (hidden state)"] = quantizer
    return found


def learned_factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that quantization added to a model: clip values and learned weight scales."""
    return [p for quantizer in quantizers_of(model) for p in quantizer.parameters(recurse=False)]


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a model has without quantization, in the order of ``parameters()``.

    Loops that treat all parameters as weights, such as a momentum teacher's update or the clamping of a Wasserstein
    critic, go over these: clips and learned scales are parameters, too, and stand between the weights.

    Args:
        model: A module, converted or not.

    Example:
        >>> import copy, torch
        >>> from amct_lightning import prepare_qat
        >>> teacher = nn.Sequential(nn.Linear(4, 2))
        >>> student = prepare_qat(teacher, None, torch.ones(1, 4))
        >>> len(list(student.parameters())), len(float_parameters(student))
        (4, 2)
        >>> for old, new in zip(float_parameters(teacher), float_parameters(student), strict=True):
        ...     _ = old.data.lerp_(new.data, 0.1)
    """
    added = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in added]


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """Return all quantizers of a model, a shared one once; those of copies beside the model are not of it."""
    layers = quantized_layers(model).values()
    found = [module for layer in layers for module in layer.children() if isinstance(module, Quantizer)]
    return list(dict.fromkeys(found))
