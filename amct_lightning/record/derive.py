"""Derive the record of a converted model from its state: clips, weights and running BatchNorm statistics."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from amct_lightning.graph.plan import LayerPlan, QuantPlan, find_plan
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.functional import EPS
from amct_lightning.record.layer_record import LayerRecord

_FP16_MAX = 65504.0
_FP16_MIN_NORMAL = 2.0**-14


def derive_layers(model: nn.Module) -> dict[str, LayerRecord]:
    """Return the factors of every quantized layer in order of first execution.

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
    waiting = [name for name, layer in layers.items() if layer.input_quantizer.calibrating]
    if waiting:
        shown = ", ".join(f"'{name}'" for name in waiting[:8]) + (", ..." if len(waiting) > 8 else "")
        raise ValueError(
            f"{len(waiting)} of {len(layers)} quantized layers are not calibrated yet: {shown}. Train for at least "
            f"{plan.config.batch_num} batch(es) that reach them, or call amct_lightning.calibrate(model, batches)."
        )
    return {layer.name: _derive(root, layers[layer.name], layer, plan) for layer in plan.layers}


@torch.no_grad()
def _derive(root: nn.Module, layer: QATLayer, layer_plan: LayerPlan, plan: QuantPlan) -> LayerRecord:
    scale_w = layer.weight_quantizer.compute_scale(layer.weight)
    if layer_plan.batch_norm is not None:
        scale_w = _fold_batch_norm(scale_w, root.get_submodule(layer_plan.batch_norm))
    scale_d = float(layer.input_quantizer.scale)
    offset_d = float(layer.input_quantizer.offset)
    _check_finite(layer_plan.name, scale_d, offset_d, scale_w)
    if plan.config.fakequant_precision_mode == "FORCE_FP16_QUANT":
        scale_d = _fp16_scale(scale_d)
    config = plan.config[layer_plan.name]
    return LayerRecord(
        scale_d=scale_d,
        offset_d=int(offset_d),
        scale_w=scale_w.tolist(),
        offset_w=[0] * scale_w.numel(),
        act_type=config.retrain_data_config.dst_type,
        wts_type=config.retrain_weight_config.dst_type,
    )


def _fold_batch_norm(scale_w: Tensor, batch_norm: nn.Module) -> Tensor:
    """Multiply the weight scales by ``|gamma / sqrt(running_var + eps)|``, the factor that folding will apply."""
    variance = cast(Tensor, batch_norm.running_var).float()
    factor = torch.rsqrt(variance + cast(float, batch_norm.eps))
    if batch_norm.weight is not None:
        factor = cast(Tensor, batch_norm.weight).float() * factor
    folded = scale_w.to(factor.device) * factor.abs()
    return torch.where(folded < EPS, 1.0, folded)


def _check_finite(name: str, scale_d: float, offset_d: float, scale_w: Tensor) -> None:
    wrong = [
        field
        for field, good in (
            ("scale_d", math.isfinite(scale_d)),
            ("offset_d", math.isfinite(offset_d)),
            ("scale_w", bool(torch.isfinite(scale_w).all())),
        )
        if not good
    ]
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
