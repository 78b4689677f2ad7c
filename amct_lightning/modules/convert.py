"""Turn the planned layers of a float model into their QAT twins, and find them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from amct_lightning.modules.layers import QATLayer
from amct_lightning.modules.registry import LAYER_TYPES
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer

if TYPE_CHECKING:
    from amct_lightning.graph.plan import LayerPlan, QuantPlan


def convert_layers(model: nn.Module, plan: QuantPlan) -> None:
    """Convert the planned layers of ``model`` in place.

    Args:
        model: The float model the plan was made for, or one of the same structure.
        plan: What to do with which layer.

    Raises:
        ValueError: If a planned layer is missing, has another type, or holds NaN or infinite weights; the model
            is unchanged then.
    """
    layers = {layer.name: _planned_layer(model, layer.name) for layer in plan.layers}
    quantizers: dict[str, ActivationQuantizer] = {}
    for layer_plan in plan.layers:
        _convert_layer(layers[layer_plan.name], layer_plan, plan, quantizers)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused evaluation path would read the weights directly and pass the quantizers by; this public
            # attribute is one of the conditions of that path.
            module.activation_relu_or_gelu = 0


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


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers of a model, a shared one once, by the name of its first layer."""
    found: dict[str, ActivationQuantizer] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QATLayer) and id(module.input_quantizer) not in seen:
            seen.add(id(module.input_quantizer))
            found[name] = module.input_quantizer
    return found


def _convert_layer(
    layer: nn.Module, plan: LayerPlan, model_plan: QuantPlan, quantizers: dict[str, ActivationQuantizer]
) -> None:
    kind = LAYER_TYPES[type(layer)]
    data = model_plan.config[plan.name].retrain_data_config
    weights = model_plan.config[plan.name].retrain_weight_config
    if weights.algo != "arq_retrain":
        raise ValueError(
            f"Layer '{plan.name}': retrain_weight_config.algo '{weights.algo}' is not available yet; use 'arq_retrain'."
        )
    if plan.shares_input_of not in quantizers:
        clip = None if data.clip_max is None or data.clip_min is None else (data.clip_max, data.clip_min)
        quantizers[plan.shares_input_of] = ActivationQuantizer(
            data.num_bits, plan.fixed_min, clip, model_plan.config.batch_num
        )
    weight = cast(Tensor, layer.weight).detach()
    kind.twin.convert(
        layer,
        quantizers[plan.shares_input_of],
        WeightQuantizer(weights.num_bits, bool(weights.channel_wise), kind.layout(layer), weight),
        plan.calibrates_input,
    )


def _planned_layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"The quantization plan names layer '{name}', which {type(model).__name__} does not have. "
            "Was the plan made for another model?"
        ) from None
    if type(layer) not in LAYER_TYPES:
        raise ValueError(
            f"The quantization plan names layer '{name}', but it is a {type(layer).__name__} now; only "
            f"{', '.join(kind.__name__ for kind in LAYER_TYPES)} can be quantized."
        )
    weight = cast(Tensor, layer.weight)
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"The weight of layer '{name}' contains NaN or infinite values. Start from a checkpoint whose weights "
            "are finite."
        )
    return layer
