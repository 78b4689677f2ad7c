"""Derive the record of a converted model from its state: clips, weights and running BatchNorm statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from amct_lightning.conversion.plan import LayerPlan, QuantPlan, find_plan
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.calibration import warn_missed
from amct_lightning.modules.degenerate import warn_degenerate
from amct_lightning.modules.folding import current_weight, deployed_scale
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, LearnedWeightQuantizer, ShiftSearch, WeightQuantizer
from amct_lightning.quantizers.functional import EPS, half_range
from amct_lightning.record.layer_record import LayerRecord
from amct_lightning.wording import abbreviated, cut_off

_FP16_MAX = 65504.0
_FP16_MIN_NORMAL = 2.0**-14


def derive_layers(model: nn.Module) -> dict[str, LayerRecord]:
    """Return the factors of every quantized layer in order of first execution.

    Layers that no training batch has reached in the time of the calibration are left out, with a warning.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        Layer name -> factors.

    Raises:
        ValueError: If the model is not converted, or a layer is not calibrated or has unusable factors.
    """
    found = find_plan(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no quantized layers, so there is no record to take from it. "
            "Convert it first, e.g. with prepare_qat(model, config, input_data)."
        )
    root, plan = found
    layers = {layer.name: cast(QATLayer, root.get_submodule(layer.name)) for layer in plan.layers}
    taken = {name: layer for name, layer in layers.items() if not layer.is_missed}
    waiting = [
        name
        for name, layer in (taken or layers).items()
        if not all(layer.get_quantizer(attribute).has_range for attribute in layer.activation_quantizers)
    ]
    if waiting:
        raise ValueError(
            f"{len(waiting)} of {len(layers)} quantized layers are not calibrated yet: {abbreviated(waiting)}. "
            f"Train for at least {plan.config.batch_num} batch(es) that reach them, or call "
            "amct_lightning.calibrate(model, batches)."
        )
    warn_missed(root)
    warn_degenerate(root)
    _warn_small_ranges(root)
    _warn_unusable_scales(layers)
    return {layer.name: _derive(root, taken[layer.name], layer, plan) for layer in plan.layers if layer.name in taken}


@torch.no_grad()
def _warn_small_ranges(model: nn.Module) -> None:
    """Tell of ranges that are given or have become so small that their scale is 1, as in AMCT."""
    found = []
    for name, quantizer in activation_quantizers(model).items():
        upper, lower = quantizer.usable_clips()
        if bool(torch.maximum(upper, -lower) < quantizer.scale):  # a scale of its own is smaller than the range
            found.append(f"'{name}' ({lower.item():.2g} to {upper.item():.2g})")
    if found:
        warnings.warn(
            f"The range of the input is too small for a scale of its own in {cut_off(found)}; the scale is 1 as in "
            "AMCT, with which all below 0.5 is rounded to 0. Give a larger clip_max, train with a smaller learning "
            "rate (quant_lr_scale in QuantRetrainCallback), or scale the input.",
            stacklevel=2,
        )


def _warn_unusable_scales(layers: Mapping[str, QATLayer]) -> None:
    """Tell of learned weight scales that no hardware can use; AMCT trains with them and records 1 in their place."""
    wrong = {}
    for name, layer in layers.items():
        quantizers = [getattr(layer, attribute) for attribute in layer.weight_quantizers]
        learned = [quantizer for quantizer in quantizers if isinstance(quantizer, LearnedWeightQuantizer)]
        count = sum(int((quantizer.scale < EPS).sum()) for quantizer in learned if not quantizer.starting)
        if count:
            wrong[name] = count
    if wrong:
        listed = cut_off(f"'{name}' ({count})" for name, count in wrong.items())
        warnings.warn(
            f"Learned weight scales became negative or zero in {listed}. The deployed network cannot use them and will "
            "differ from the trained one. Train the scales with a smaller learning rate (quant_lr_scale=0.01 in "
            "QuantRetrainCallback), or use arq_retrain.",
            stacklevel=2,
        )


@torch.no_grad()
def _derive(root: nn.Module, layer: QATLayer, layer_plan: LayerPlan, plan: QuantPlan) -> LayerRecord:
    config = plan.config[layer_plan.name]
    batch_norm = None if layer_plan.batch_norm is None else root.get_submodule(layer_plan.batch_norm)
    fp16 = plan.config.fakequant_precision_mode == "FORCE_FP16_QUANT"
    factors = _activation_factors(layer, "input_quantizer", "d", fp16)
    factors |= _weight_factors(layer, "weight_quantizer", "w", batch_norm)
    if "hidden_quantizer" in layer.activation_quantizers:
        factors |= _activation_factors(layer, "hidden_quantizer", "h", fp16)
        factors |= _weight_factors(layer, "recurrent_weight_quantizer", "r")
    _check_finite(layer_plan.name, factors)
    values: dict[str, Any] = {name: value.tolist() for name, value in factors.items()}
    return LayerRecord(
        **{name: _integers(value) if name.startswith("offset") else value for name, value in values.items()},
        act_type=config.retrain_data_config.dst_type,
        wts_type=config.retrain_weight_config.dst_type,
        shift_bit=cast(ShiftSearch, layer.shift_search).shift_bit() if hasattr(layer, "shift_search") else [],
    )


def _activation_factors(layer: QATLayer, quantizer: str, suffix: str, fp16: bool) -> dict[str, Tensor]:
    found = layer.get_quantizer(quantizer)
    scale, offset = found.scale, found.offset
    if fp16 and bool(torch.isfinite(scale)):
        scale, offset = _fp16_factors(scale, offset, found)
    return {f"scale_{suffix}": scale, f"offset_{suffix}": offset}


def _fp16_factors(scale: Tensor, offset: Tensor, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Round a scale to float16, and take the offset that the lower clip has with it: training knows neither."""
    rounded = torch.full_like(scale, _fp16_scale(scale.item()))
    if torch.equal(rounded, scale):
        return scale, offset
    h = half_range(quantizer.num_bits)
    lower = quantizer.usable_clips()[1].clamp(max=0)
    return rounded, torch.round(-h - lower / rounded).clamp_(-h, h - 1)


def _weight_factors(
    layer: QATLayer, quantizer: str, suffix: str, batch_norm: nn.Module | None = None
) -> dict[str, Tensor]:
    weight = current_weight(layer, layer.weight_quantizers[quantizer])
    scale = deployed_scale(cast(WeightQuantizer, getattr(layer, quantizer)), weight, batch_norm)
    scale = _in_record_order(scale, layer)
    return {f"scale_{suffix}": scale, f"offset_{suffix}": torch.zeros_like(scale)}


def _in_record_order(scale: Tensor, layer: QATLayer) -> Tensor:
    """Bring the gates of a recurrent layer into ONNX order; one scale for all stands there once per gate."""
    gates = LAYER_TYPES[supported_class(layer)].gates
    if not gates:
        return scale
    per_gate = scale.expand(len(gates)) if scale.numel() == 1 else scale
    return per_gate.view(len(gates), -1)[list(gates)].flatten()


def _integers(value: Any) -> Any:
    return [int(number) for number in value] if isinstance(value, list) else int(value)


def _check_finite(name: str, factors: Mapping[str, Tensor]) -> None:
    wrong = [field for field, value in factors.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ValueError(
            f"Layer '{name}' has NaN or infinite factors ({', '.join(wrong)}), so no record can be taken. The training "
            "has diverged: lower the learning rate, or go back to the last good checkpoint."
        )


def _fp16_scale(scale: float) -> float:
    """Round a scale to what float16 hardware holds: itself, or the square of a float16 root out of range."""
    if scale > _FP16_MAX or scale < _FP16_MIN_NORMAL:
        return float(np.float16(math.sqrt(scale))) ** 2
    return float(np.float16(scale))
