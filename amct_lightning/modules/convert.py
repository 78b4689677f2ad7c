"""Turn the planned layers of a float model into their QAT twins, and find them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.modules.folding import whole_tensor
from amct_lightning.modules.layers import QATLayer
from amct_lightning.modules.registry import QAT_CLASSES, channel_layout, float_class
from amct_lightning.modules.shift_hook import install_shift_search, remove_shift_search
from amct_lightning.quantizers import ActivationQuantizer, LearnedWeightQuantizer, Quantizer, WeightQuantizer

if TYPE_CHECKING:
    from amct_lightning.config import DataConfig, WeightConfig
    from amct_lightning.plan import LayerPlan, QuantPlan

# What DDP (torch 1.7 to 2.13) leaves alone in the module that it wraps: a prototype of torch, without a public name.
_LEFT_OUT = "_ddp_params_and_buffers_to_ignore"


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
        if plan.search_n and not isinstance(layers[layer_plan.name], nn.RNNBase):
            batch_norm = None if layer_plan.batch_norm is None else model.get_submodule(layer_plan.batch_norm)
            install_shift_search(cast(QATLayer, layers[layer_plan.name]), batch_norm)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused evaluation path would read the weights directly and pass the quantizers by; this public
            # attribute is one of the conditions of that path.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors cannot be rounded
    leave_out_of_broadcast(model)


def leave_out_of_broadcast(model: nn.Module) -> None:
    """Spare ``DistributedDataParallel`` the buffers of the quantizers, which it would send around before every forward.

    They follow from parameters and calibrated ranges, which are equal in all processes, so nobody needs to send them.
    With them, a model without buffers of its own would have two collectives more in every step than in float.

    Args:
        model: A converted model, or the module around one that is to be wrapped.

    Example:
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


def revert_layers(model: nn.Module) -> None:
    """Turn the QAT layers of ``model`` back into float layers, in place; weights stay, quantizers are dropped.

    Args:
        model: A converted model.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4))
        >>> revert_layers(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    remove_shift_search(model)
    for layer in list(quantized_layers(model).values()):
        twin = cast(QATLayer, layer)
        for name in (*twin.activation_quantizers, *twin.weight_quantizers):
            delattr(twin, name)
        for attribute in ("calibrates_input", "float_is_expected", "quant_mode"):
            twin.__dict__.pop(attribute, None)
        layer.__class__ = float_class(twin)
    leave_out_of_broadcast(model)


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


def _convert_layer(
    layer: nn.Module, plan: LayerPlan, model_plan: QuantPlan, quantizers: dict[str, ActivationQuantizer]
) -> None:
    twin = QAT_CLASSES[type(layer)]
    config = model_plan.config[plan.name]
    batch_num = model_plan.config.batch_num * plan.calls
    if plan.shares_input_of not in quantizers:
        quantizers[plan.shares_input_of] = _activation_quantizer(config.retrain_data_config, plan.fixed_min, batch_num)
    own: dict[str, Quantizer] = {"input_quantizer": quantizers[plan.shares_input_of]}
    if "hidden_quantizer" in twin.activation_quantizers:
        own["hidden_quantizer"] = _activation_quantizer(config.retrain_data_config, plan.fixed_min_hidden, batch_num)
    for name, parameter in twin.weight_quantizers.items():
        own[name] = _weight_quantizer(layer, parameter, config.retrain_weight_config)
    twin.convert(layer, own, plan.calibrates_input)


def _activation_quantizer(config: DataConfig, fixed_min: bool, batch_num: int) -> ActivationQuantizer:
    clip = None if config.clip_max is None or config.clip_min is None else (config.clip_max, config.clip_min)
    return ActivationQuantizer(config.num_bits, fixed_min, clip, batch_num)


def _weight_quantizer(layer: nn.Module, parameter: str, config: WeightConfig) -> WeightQuantizer:
    layout = channel_layout(layer)
    weight = whole_tensor(cast(Tensor, getattr(layer, parameter))).detach()
    channel_wise = bool(config.channel_wise)
    if config.algo == "ulq_retrain":
        elements = LAYER_TYPES[type(layer)].scale_elements(layer, weight, channel_wise)
        return LearnedWeightQuantizer(config.num_bits, channel_wise, layout, weight, elements)
    return WeightQuantizer(config.num_bits, channel_wise, layout, weight)


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
    for parameter in QAT_CLASSES[type(layer)].weight_quantizers.values():
        weight = whole_tensor(cast(Tensor, getattr(layer, parameter)))
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"The weight of layer '{name}' contains NaN or infinite values. Start from a checkpoint whose weights "
                "are finite."
            )
    return layer
