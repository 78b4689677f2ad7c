"""Turn the planned layers of a float model into their QAT twins, and back.

A model is converted if it carries a plan, and only then: :func:`convert_layers` attaches it, :func:`revert_layers`
takes it away, ``find_plan`` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from amct_lightning.config import DataConfig, WeightConfig
from amct_lightning.conversion.plan import LayerPlan, QuantPlan, carried_plan
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.modules import QATLayer, leave_out_of_broadcast
from amct_lightning.modules.convert import PLAN_ATTRIBUTE
from amct_lightning.modules.folding import whole_tensor
from amct_lightning.modules.grid.norm import FoldedNorm, fold_norm
from amct_lightning.modules.registry import QAT_CLASSES, channel_layout, qat_class
from amct_lightning.modules.shift_hook import install_shift_search, remove_shift_search
from amct_lightning.modules.starting.readers import note_reader
from amct_lightning.quantizers import (
    ActivationQuantizer,
    LearnedWeightQuantizer,
    Quantizer,
    RatioWeightQuantizer,
    SearchedLearnedWeightQuantizer,
    WeightQuantizer,
)
from amct_lightning.quantizers.calibrating import PERCENTILE
from amct_lightning.quantizers.executors.table import FactorTable
from amct_lightning.quantizers.rangeless import FloatActivations, TokenQuantizer

STAYS_FLOAT = "_amct_stays_float"
"""Marks a layer that was reverted on its own, in a model that is converted."""


def convert_layers(model: nn.Module, plan: QuantPlan, weights_follow: bool = False) -> None:
    """Convert the planned layers of ``model`` in place; deepcopy and pickle of the model take the plan along.

    Args:
        model: The float model the plan was made for, or one of the same structure.
        plan: What to do with which layer.
        weights_follow: Whether other weights are about to be loaded, so that the present ones do not count.

    Raises:
        ValueError: If a planned layer is missing, has another type, or holds NaN or infinite weights; the model
            is unchanged then.
    """
    layers = {layer.name: _planned_layer(model, layer.name) for layer in plan.layers}
    if not weights_follow:
        _check_weights(layers)
    quantizers: dict[str, ActivationQuantizer] = {}
    for layer_plan in plan.layers:
        _convert_layer(layers[layer_plan.name], layer_plan, plan, quantizers)
        _install_search(model, layers[layer_plan.name], layer_plan, plan)
    table = FactorTable()
    for quantizer in quantizers.values():
        quantizer.table, quantizer.uses = table, 0
    for layer_plan in plan.layers:
        if layer_plan.shares_input_of in quantizers:
            quantizers[layer_plan.shares_input_of].uses += layer_plan.calls
    fold_norms(model, plan)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused evaluation path would read the weights directly and pass the quantizers by; this public
            # attribute is one of the conditions of that path.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors cannot be rounded
    leave_out_of_broadcast(model)
    setattr(model, PLAN_ATTRIBUTE, plan)


def renew_layers(model: nn.Module, plan: QuantPlan) -> list[str]:
    """Convert float layers that stand where the plan wants quantized ones, such as a new head.

    Args:
        model: A converted model.
        plan: Its plan.

    Returns:
        The names of these layers.

    Raises:
        ValueError: If such a layer is missing or of another type than the one that was converted, or holds NaN or
            infinite weights; the model is unchanged then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    float_layers = [layer for layer in plan.layers if not isinstance(modules.get(layer.name), QATLayer)]
    missing = [layer for layer in float_layers if not hasattr(modules.get(layer.name), STAYS_FLOAT)]
    if not missing:
        return []
    layers = {layer.name: _planned_layer(model, layer.name) for layer in missing}
    for layer in missing:
        kind = type(layers[layer.name]).__name__
        if kind != layer.type:
            raise ValueError(
                f"Layer '{layer.name}' was a {layer.type} when {type(model).__name__} was converted and is a {kind} "
                "now. Convert the model again: revert_layers(model) makes a float model of it, with its weights."
            )
    _check_weights(layers)
    owned = {layer.shares_input_of: modules[layer.name] for layer in plan.layers if layer not in float_layers}
    quantizers = {owner: cast(QATLayer, layer).input_quantizer for owner, layer in owned.items()}
    for layer in missing:
        _convert_layer(layers[layer.name], layer, plan, quantizers)
        _install_search(model, layers[layer.name], layer, plan)
    fold_norms(model, plan)
    leave_out_of_broadcast(model)
    return list(layers)


def fold_norms(model: nn.Module, plan: QuantPlan) -> None:
    """Let the layers on the device's grid fold their BatchNorms in evaluation, also those that are others by now.

    ``convert_sync_batchnorm`` puts others in their places.

    Args:
        model: A converted model.
        plan: Its plan.
    """
    modules = dict(model.named_modules(remove_duplicate=False)) if plan.deploy_grid else {}
    for layer in plan.layers:
        if isinstance(modules.get(layer.name), QATLayer) and layer.batch_norm is not None:
            fold_norm(modules[layer.name], model, layer.batch_norm)


def revert_layers(model: nn.Module) -> None:
    """Turn the QAT layers of ``model`` back into float layers, in place; weights stay, quantizers are dropped.

    Args:
        model: A converted model, or a part of one: the rest then stays quantized, and the part float.

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
    is_part = carried_plan(model) is None
    for layer in [module for module in model.modules() if isinstance(module, QATLayer)]:
        layer.revert()
        if is_part:  # the plan is with the whole, which must not take it for a layer to be quantized
            setattr(layer, STAYS_FLOAT, True)
    for norm in [module for module in model.modules() if isinstance(module, FoldedNorm)]:
        norm.revert()  # without its layer, which is not in this part
    leave_out_of_broadcast(model)
    for module in model.modules():
        module.__dict__.pop(PLAN_ATTRIBUTE, None)


def _install_search(model: nn.Module, layer: nn.Module, layer_plan: LayerPlan, plan: QuantPlan) -> None:
    config = plan.config[layer_plan.name]
    has_sums = config.retrain_data_config.has_clips and config.retrain_weight_config.group_size is None
    if plan.search_n and has_sums and not isinstance(layer, nn.RNNBase):
        batch_norm = None if layer_plan.batch_norm is None else model.get_submodule(layer_plan.batch_norm)
        install_shift_search(cast(QATLayer, layer), batch_norm)


def _convert_layer(
    layer: nn.Module, plan: LayerPlan, model_plan: QuantPlan, quantizers: dict[str, ActivationQuantizer]
) -> None:
    config = model_plan.config[plan.name]
    data, count = config.retrain_data_config, (model_plan.config.batch_num, plan.calls)
    twin = qat_class(layer, data.has_clips)
    own: dict[str, Quantizer] = {}
    if data.has_clips:
        if plan.shares_input_of not in quantizers:
            quantizers[plan.shares_input_of] = _activation_quantizer(data, plan.fixed_min, *count)
            quantizers[plan.shares_input_of].serving = _served_in(plan.shares_input_of, model_plan)
        own["input_quantizer"] = quantizers[plan.shares_input_of]
    else:
        own["input_quantizer"] = TokenQuantizer(data.num_bits) if data.is_quantized else FloatActivations()
    if "hidden_quantizer" in twin.activation_quantizers:
        own["hidden_quantizer"] = _activation_quantizer(data, plan.fixed_min_hidden, *count)
    layer.__dict__.pop(STAYS_FLOAT, None)
    for name, parameter in twin.weight_quantizers.items():
        own[name] = _weight_quantizer(layer, parameter, config.retrain_weight_config)
    converted = twin.convert(layer, own, plan.calibrates_input)
    if data.has_clips:
        note_reader(quantizers[plan.shares_input_of], layer)
    if model_plan.deploy_grid:
        converted.deploy_grid = True


def _served_in(owner: str, plan: QuantPlan) -> torch.dtype | None:
    """Return the dtype in which servers have a quantizer, on which they have Linear layers of INT8 only."""
    if plan.serving is None:
        return None
    layers = [(layer.type, plan.config[layer.name]) for layer in plan.layers if layer.shares_input_of == owner]
    kinds = {(kind, one.retrain_data_config.dst_type, one.retrain_weight_config.dst_type) for kind, one in layers}
    return getattr(torch, plan.serving) if kinds == {(nn.Linear.__name__, "INT8", "INT8")} else None


def _activation_quantizer(config: DataConfig, fixed_min: bool, batch_num: int, calls: int) -> ActivationQuantizer:
    clip = None if config.clip_max is None or config.clip_min is None else (config.clip_max, config.clip_min)
    quantizer = ActivationQuantizer(config.num_bits, fixed_min, clip, batch_num, calls, config.symmetric)
    quantizer.start = config.init, config.percentile or PERCENTILE
    return quantizer


def _weight_quantizer(layer: nn.Module, parameter: str, config: WeightConfig) -> WeightQuantizer:
    layout = channel_layout(layer)
    weight = whole_tensor(cast(Tensor, getattr(layer, parameter))).detach()
    channel_wise = bool(config.channel_wise)
    if config.group_size is not None:
        layout = replace(layout, group_size=config.group_size)
    if config.algo == "ulq_retrain":
        elements = config.group_size or LAYER_TYPES[type(layer)].scale_elements(layer, weight, channel_wise)
        learned = SearchedLearnedWeightQuantizer if config.init == "mse" else LearnedWeightQuantizer
        return learned(config.num_bits, channel_wise, layout, weight, elements)
    kind = RatioWeightQuantizer if config.init == "mse" else WeightQuantizer
    return kind(config.num_bits, channel_wise, layout, weight)


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
    return layer


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        for parameter in QAT_CLASSES[type(layer)].weight_quantizers.values():
            weight = whole_tensor(cast(Tensor, getattr(layer, parameter)))
            if not weight.is_meta and not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"The weight of layer '{name}' contains NaN or infinite values. Start from a checkpoint whose "
                    "weights are finite."
                )
