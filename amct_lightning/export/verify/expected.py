"""The numbers that a file must hold for each layer, derived from the model and not from any file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from amct_lightning.conversion.plan import LayerPlan
from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules.deployed import bias_codes, dequant_scale, folded_bias, folded_weight, weight_codes
from amct_lightning.modules.folding import current_weight, fold_factor
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import WeightQuantizer
from amct_lightning.record import LayerRecord


@dataclass(frozen=True, eq=False)
class Product:
    """The integers of one product of a layer with a weight.

    Attributes:
        codes: The integers of the weight, int8, as the float layer lays them out; gates in ONNX's order.
        scale: The scales of the sums, 1-d float32.
        weight_scale: Those of the weight alone: with the input's they make ``scale``.
        bias: The integers of the bias, 1-d int64; ``None`` without one, or if the weight has a scale per group.
        float_bias: The bias with its BatchNorm folded in, 1-d float32; ``None`` without one.
        flips: Per output channel, how many integers of the weight folding has rounded otherwise than training did.
    """

    codes: np.ndarray
    scale: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None
    float_bias: np.ndarray | None
    flips: np.ndarray


@dataclass(frozen=True, eq=False)
class ExpectedLayer:
    """What a file must hold for a layer.

    Attributes:
        name: Name of the layer.
        module: The layer.
        record: Its factors.
        input: The product with its input.
        hidden: The product with the hidden state, of an LSTM or GRU.
        bits: Bits of its activations.
        folds: The BatchNorm that is folded into it.
        attributes: The attributes of its ONNX node that follow from the layer.
    """

    name: str
    module: QATLayer
    record: LayerRecord
    input: Product
    hidden: Product | None
    bits: int
    folds: nn.Module | None
    attributes: Mapping[str, Any]


@torch.no_grad()
def expected_layer(
    root: nn.Module, layer_plan: LayerPlan, record: LayerRecord, dequant_bits: int = 32
) -> ExpectedLayer:
    """Return what a file must hold for a layer.

    Args:
        root: The converted module.
        layer_plan: The plan of the layer.
        record: The factors of the layer, as they are now.
        dequant_bits: How many bits of the dequantization scales the file holds.
    """
    layer = cast(QATLayer, root.get_submodule(layer_plan.name))
    kept = _bits(record.wts_type), dequant_bits
    norm = None if layer_plan.batch_norm is None else root.get_submodule(layer_plan.batch_norm)
    hidden = None
    if "hidden_quantizer" in layer.activation_quantizers:
        first = _product(layer, "weight_quantizer", "bias_ih_l0", record.input_factors[0], record.scale_w, kept, None)
        hidden = _product(
            layer, "recurrent_weight_quantizer", "bias_hh_l0", record.scale_h or 1.0, record.scale_r, kept, None
        )
    else:
        first = _product(layer, "weight_quantizer", "bias", record.input_factors[0], record.scale_w, kept, norm)
    bits = _bits(record.act_type)
    return ExpectedLayer(layer_plan.name, layer, record, first, hidden, bits, norm, _attributes(layer))


def _product(
    layer: QATLayer,
    quantizer: str,
    bias_name: str,
    scale_d: float,
    scale_w: Any,
    kept: tuple[int, int],
    norm: nn.Module | None,
) -> Product:
    bits, dequant_bits = kept
    weights = cast(WeightQuantizer, getattr(layer, quantizer))
    trained = current_weight(layer, layer.weight_quantizers[quantizer]).detach()
    gates = LAYER_TYPES[supported_class(layer)].gates
    weight = _reordered(folded_weight(trained, norm), gates)
    scale = torch.tensor(list(scale_w), dtype=torch.float32, device=weight.device)
    per_row = _per_row(scale, weight, gates)
    codes = weight_codes(weight, per_row, weights.layout, bits)
    bias = getattr(layer, bias_name, None)
    folded = folded_bias(None if bias is None else current_weight(layer, bias_name).detach(), norm)
    given = torch.tensor(scale_d, dtype=torch.float32, device=weight.device)
    total, kept_total = (dequant_scale(given, per_row, kept_bits) for kept_bits in (32, dequant_bits))
    ordered = None if folded is None else _reordered(folded, gates)
    own = weights.compute_scale(trained)
    as_trained = _reordered(weight_codes(trained.float(), own, weights.layout, bits), gates)
    if norm is not None:
        as_trained = as_trained * fold_factor(norm).sign().view(-1, *[1] * (weight.dim() - 1))
    different = weights.layout.view(as_trained != codes)
    flips = different.sum(weights.layout.reduced_dims(different, True))
    return Product(
        codes.to(torch.int8).cpu().numpy(),
        kept_total.cpu().numpy(),
        (scale if dequant_bits >= 32 else dequant_scale(given, scale, dequant_bits) / given).cpu().numpy(),
        None if ordered is None or weights.layout.group_size else bias_codes(ordered, total).long().cpu().numpy(),
        None if ordered is None else ordered.cpu().numpy(),
        flips.flatten().cpu().numpy(),
    )


def _bits(kind: str) -> int:
    return int(kind.removeprefix("INT"))


def _reordered(rows: Tensor, gates: tuple[int, ...]) -> Tensor:
    """Bring the gates of a recurrent layer into ONNX's order."""
    return rows.unflatten(0, (len(gates), -1))[list(gates)].flatten(0, 1) if gates else rows


def _per_row(scale: Tensor, weight: Tensor, gates: tuple[int, ...]) -> Tensor:
    return scale.repeat_interleave(weight.shape[0] // scale.numel()) if gates else scale


def _attributes(layer: QATLayer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    module = cast(Any, layer)
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return {"hidden_size": module.hidden_size} | ({"linear_before_reset": 1} if isinstance(layer, nn.GRU) else {})
    if not hasattr(layer, "stride"):
        return found
    found = {"strides": list(module.stride), "dilations": list(module.dilation), "group": module.groups}
    if not isinstance(module.padding, str):
        found["pads"] = list(module.padding) * 2
    return found  # output_padding follows from the call (output_size), and shows in the shape of the output
