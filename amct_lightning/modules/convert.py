"""What a conversion has put into a model: finding it, and keeping ``DistributedDataParallel`` from sending it around.

The conversion itself is in ``conversion/convert.py``, that of a single layer in ``layers.py``.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, Quantizer

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
    present = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    others = [name for name in getattr(model, _LEFT_OUT, ()) if name not in names and name in present]
    setattr(model, _LEFT_OUT, [*others, *names])


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantized layers of a model by name.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        Name -> layer, in ``named_modules()`` order; each has ``input_quantizer`` and ``weight_quantizer``.

    Example:
        >>> quantized_layers(nn.Linear(2, 2))
        {}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers of a model, a shared one once.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        Name -> quantizer: the (first) layer's name, with `` (hidden state)`` for a recurrent layer's second one.
    """
    found: dict[str, ActivationQuantizer] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute in module.activation_quantizers if isinstance(module, QATLayer) else ():
            quantizer = cast(QATLayer, module).get_quantizer(attribute)
            if id(quantizer) not in seen:
                seen.add(id(quantizer))
                found[name if attribute == "input_quantizer" else f"{name} (hidden state)"] = quantizer
    return found


def learned_factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that quantization added to a model: clip values and learned weight scales."""
    return [p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters(recurse=False)]
