"""Derive the record of a converted model from its state: clips, weights and running BatchNorm statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from amct_lightning.config import DataConfig
from amct_lightning.conversion.plan import LayerPlan, QuantPlan, find_plan
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.calibration import warn_missed
from amct_lightning.modules.degenerate import warn_degenerate
from amct_lightning.modules.folding import current_weight, deployed_scale
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer, LearnedWeightQuantizer, ShiftSearch, WeightQuantizer
from amct_lightning.quantizers.functional import EPS, half_range
from amct_lightning.quantizers.shift_search import best_shifts
from amct_lightning.record.checks import PER_TOKEN
from amct_lightning.record.layer_record import LayerRecord
from amct_lightning.wording import abbreviated, cut_off

_Array = npt.NDArray[np.float32]
_Float = np.float32
_Key = tuple[str, str]

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
    planned = [layer for layer in plan.layers if layer.name in taken]
    quantizers = activation_quantizers(root)
    # Everything is read from the device at once; in the order of the plan, as ranks gather sharded weights together.
    wanted = {("range", name): _range_of(quantizer) for name, quantizer in quantizers.items()}
    wanted |= {("unusable", name): {"count": _unusable_scales(layer)} for name, layer in layers.items()}
    wanted |= {("layer", layer.name): _weight_factors(root, taken[layer.name], layer) for layer in planned}
    numbers = _read_at_once(wanted)
    _warn_small_ranges({name: numbers["range", name] for name in quantizers})
    _warn_unusable_scales({name: int(numbers["unusable", name]["count"].item()) for name in layers})
    ranges = {quantizer: numbers["range", name] for name, quantizer in quantizers.items()}
    return {
        layer.name: _derive(layer.name, taken[layer.name], plan, ranges, numbers["layer", layer.name])
        for layer in planned
    }


@torch.no_grad()
def _read_at_once(wanted: Mapping[_Key, Mapping[str, Tensor]]) -> dict[_Key, dict[str, _Array]]:
    """Copy tensors to the host, float32 and 1-d; the host waits for each device once."""
    by_device: dict[torch.device, list[tuple[_Key, str, Tensor]]] = {}
    for key, tensors in wanted.items():
        for name, tensor in tensors.items():
            by_device.setdefault(tensor.device, []).append((key, name, tensor.detach().reshape(-1).float()))
    found: dict[_Key, dict[str, _Array]] = {key: {} for key in wanted}
    for entries in by_device.values():
        flat = torch.cat([tensor for _, _, tensor in entries]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for _, _, tensor in entries])
        for (key, name, _), part in zip(entries, np.split(flat, ends[:-1]), strict=True):
            found[key][name] = part
    return found


@torch.no_grad()
def _range_of(quantizer: ActivationQuantizer) -> dict[str, Tensor]:
    upper, lower = quantizer.usable_clips()
    scale, offset = quantizer.factors_of(upper, lower)
    return {"upper": upper, "lower": lower, "scale": scale, "offset": offset}


def _warn_small_ranges(ranges: Mapping[str, Mapping[str, _Array]]) -> None:
    """Tell of ranges that are given or have become so small that their scale is 1, as in AMCT."""
    found = []
    for name, numbers in ranges.items():
        upper, lower, scale = (numbers[key].item() for key in ("upper", "lower", "scale"))
        if max(upper, -lower) < scale == 1:  # a scale of its own is smaller than the range
            found.append(f"'{name}' ({lower:.2g} to {upper:.2g})")
    if found:
        warnings.warn(
            f"The range of the input is too small for a scale of its own in {cut_off(found)}; the scale is 1 as in "
            "AMCT, with which all below 0.5 is rounded to 0. Give a larger clip_max, train with a smaller learning "
            "rate (quant_lr_scale in QuantRetrainCallback), or scale the input.",
            stacklevel=3,
        )


@torch.no_grad()
def _unusable_scales(layer: QATLayer) -> Tensor:
    """Count the learned weight scales that no hardware can use; AMCT trains with them and records 1 in their place."""
    quantizers = [getattr(layer, attribute) for attribute in layer.weight_quantizers]
    learned = [q for q in quantizers if isinstance(q, LearnedWeightQuantizer) and not q.starting]
    return sum(((q.scale < EPS).sum() for q in learned), start=torch.zeros(()))


def _warn_unusable_scales(counts: Mapping[str, int]) -> None:
    wrong = {name: count for name, count in counts.items() if count}
    if wrong:
        listed = cut_off(f"'{name}' ({count})" for name, count in wrong.items())
        warnings.warn(
            f"Learned weight scales became negative or zero in {listed}. The deployed network cannot use them and will "
            "differ from the trained one. Train the scales with a smaller learning rate (quant_lr_scale=0.01 in "
            "QuantRetrainCallback), or use arq_retrain.",
            stacklevel=3,
        )


@torch.no_grad()
def _weight_factors(root: nn.Module, layer: QATLayer, layer_plan: LayerPlan) -> dict[str, Tensor]:
    batch_norm = None if layer_plan.batch_norm is None else root.get_submodule(layer_plan.batch_norm)
    factors = {"scale_w": _weight_scale(layer, "weight_quantizer", batch_norm)}
    if "recurrent_weight_quantizer" in layer.weight_quantizers:
        factors["scale_r"] = _weight_scale(layer, "recurrent_weight_quantizer")
    if hasattr(layer, "shift_search"):
        search = cast(ShiftSearch, layer.shift_search)
        factors |= {"shift_batches": search.batches, "shift_bit": best_shifts(search.errors)}
    return factors


def _weight_scale(layer: QATLayer, quantizer: str, batch_norm: nn.Module | None = None) -> Tensor:
    weight = current_weight(layer, layer.weight_quantizers[quantizer])
    scale = deployed_scale(cast(WeightQuantizer, getattr(layer, quantizer)), weight, batch_norm)
    return _in_record_order(scale, layer)


def _derive(
    name: str,
    layer: QATLayer,
    plan: QuantPlan,
    ranges: Mapping[ActivationQuantizer, Mapping[str, _Array]],
    numbers: Mapping[str, _Array],
) -> LayerRecord:
    config = plan.config[name]
    values: dict[str, Any] = {}
    for attribute, suffix in zip(layer.activation_quantizers, "dh", strict=False):
        quantizer = layer.get_quantizer(attribute)
        scale, offset, lower = (ranges[quantizer][key][0] for key in ("scale", "offset", "lower"))
        if plan.config.fakequant_precision_mode == "FORCE_FP16_QUANT" and np.isfinite(scale):
            # A range around 0 has the offset 0 with any scale.
            rounded = _fp16_factors(scale, offset, lower, quantizer.num_bits)
            scale, offset = (rounded[0], offset) if quantizer.symmetric else rounded
        values |= {f"scale_{suffix}": scale, f"offset_{suffix}": offset}
    values |= {key: scales for key, scales in numbers.items() if key in ("scale_w", "scale_r")}
    _check_finite(name, values)
    values |= {f"offset_{key[-1]}": [0] * len(values[key]) for key in ("scale_w", "scale_r") if key in values}
    values |= {key: int(values[key]) for key in ("offset_d", "offset_h") if key in values}
    shifts = numbers["shift_bit"].tolist() if "shift_bit" in numbers and numbers["shift_batches"].item() else []
    return LayerRecord(
        **{"scale_d": None, "offset_d": None} | values,
        act_type=_act_type(config.retrain_data_config),
        wts_type=config.retrain_weight_config.dst_type,
        shift_bit=[int(shift) for shift in shifts],
    )


def _act_type(data: DataConfig) -> str:
    if data.has_clips:
        return data.dst_type
    return f"{data.dst_type}{PER_TOKEN}" if data.is_quantized else "FLOAT"


def _fp16_factors(scale: _Float, offset: _Float, lower: _Float, num_bits: int) -> tuple[_Float, _Float]:
    """Round a scale to float16, and take the offset that the lower clip has with it: training knows neither."""
    rounded = np.float32(_fp16_scale(float(scale)))
    if rounded == scale:
        return scale, offset
    h = half_range(num_bits)
    return rounded, np.clip(np.rint(np.float32(-h) - np.minimum(lower, np.float32(0)) / rounded), -h, h - 1)


def _in_record_order(scale: Tensor, layer: QATLayer) -> Tensor:
    """Bring the gates of a recurrent layer into ONNX order; one scale for all stands there once per gate."""
    gates = LAYER_TYPES[supported_class(layer)].gates
    if not gates:
        return scale
    per_gate = scale.expand(len(gates)) if scale.numel() == 1 else scale
    return torch.stack([per_gate.view(len(gates), -1)[gate] for gate in gates]).flatten()  # no copy of an index


def _check_finite(name: str, factors: Mapping[str, Any]) -> None:
    wrong = [field for field, value in factors.items() if not np.isfinite(value).all()]
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
