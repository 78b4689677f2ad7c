"""The numbers of a deployed layer: integer weights and biases, and the factors around them, as NumPy arrays.

The formulas are in ``modules/deployed.py``. What comes from a record file here are the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from amct_lightning.layer_types import LAYER_TYPES, supported_class
from amct_lightning.modules.deployed import bias_codes, dequant_scale, folded_bias, folded_weight, weight_codes
from amct_lightning.modules.folding import current_weight
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import WeightQuantizer
from amct_lightning.record.layer_record import LayerRecord

Array = NDArray[Any]

_INT32_END = 2.0**31
_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}


@dataclass(frozen=True)
class Factors:
    """How a layer's input, or its hidden state, is quantized.

    Attributes:
        scale: Its scale, float32.
        offset: Its offset, an integer within the range of the type.
        type: ``INT4``, ``INT8`` or ``INT16``.
    """

    scale: np.float32
    offset: int
    type: str

    @property
    def bits(self) -> int:
        """The number of bits of the type."""
        return _BITS[self.type]

    @property
    def reciprocal(self) -> np.float32:
        """By what the hardware multiplies: ``1 / scale`` in float32."""
        return np.float32(1.0) / self.scale


@dataclass(frozen=True)
class Product:
    """A weight and the bias of its sums, as the hardware multiplies and adds them.

    Attributes:
        codes: The integers of the weight as the float layer lays it out, int8.
        scale_w: Scales of the weight, one per output channel or a single one, float32: those of the record, or those
            that make ``dequant`` together with the input's if not all of its bits are kept.
        type: ``INT4`` or ``INT8``.
        dequant: By what the sums are multiplied, as many float32 numbers.
        bias: The integers of the bias, int32, one per output channel; ``None`` without one.
        float_bias: The bias as it is, float32, a BatchNorm folded in.
        group_size: How many inputs of an output channel share a scale; 0 for all. Such sums have no integer bias.
    """

    codes: Array
    scale_w: Array
    type: str
    dequant: Array
    bias: Array | None
    float_bias: Array | None
    group_size: int = 0


@dataclass(frozen=True)
class LayerNumbers:
    """All numbers of a deployed layer.

    Attributes:
        name: Name of the layer.
        layer: The layer itself, for its strides and the like.
        input: How its input is quantized.
        product: Its weight and bias; of a recurrent layer those of the input.
        hidden: How the hidden state of a recurrent layer is quantized.
        recurrent: The recurrent weight and its bias.
    """

    name: str
    layer: QATLayer
    input: Factors
    product: Product
    hidden: Factors | None = None
    recurrent: Product | None = None


@torch.no_grad()
def layer_numbers(
    name: str, layer: QATLayer, record: LayerRecord, batch_norm: nn.Module | None, dequant_bits: int = 32
) -> LayerNumbers:
    """Compute the numbers of a layer from its weights and its record.

    Args:
        name: Name of the layer, for messages.
        layer: The quantized layer.
        record: Its factors.
        batch_norm: The BatchNorm that is folded into it, if any.
        dequant_bits: How many bits of the dequantization scales are kept: 32 or 19.

    Returns:
        The numbers. Gates of recurrent layers stay in torch's order, their scales with them.

    Raises:
        RuntimeError: If a bias does not fit into 32 bits.
        ValueError: If the record does not fit the layer.
    """
    scale_d, offset_d = record.input_factors
    given = Factors(np.float32(scale_d), offset_d, record.act_type)
    gates = LAYER_TYPES[supported_class(layer)].gates
    if not gates:
        bias = folded_bias(cast("Tensor | None", layer.bias), batch_norm)
        scale = torch.tensor(record.scale_w)
        product = _product(name, layer, "weight_quantizer", (given, scale, bias, record), batch_norm, dequant_bits)
        return LayerNumbers(name, layer, given, product)
    if record.scale_h is None or record.offset_h is None:
        raise ValueError(f"The record has no factors of the hidden state for '{name}', which is recurrent.")
    hidden = Factors(np.float32(record.scale_h), record.offset_h, record.act_type)
    biases = [folded_bias(getattr(layer, side, None), None) for side in ("bias_ih_l0", "bias_hh_l0")]
    scales = [_in_torch_order(torch.tensor(values), gates) for values in (record.scale_w, record.scale_r)]
    parts = [
        _product(name, layer, quantizer, (factors, scale, bias, record), None, dequant_bits)
        for quantizer, factors, scale, bias in zip(
            ("weight_quantizer", "recurrent_weight_quantizer"), (given, hidden), scales, biases, strict=True
        )
    ]
    return LayerNumbers(name, layer, given, parts[0], hidden, parts[1])


def _product(
    name: str,
    layer: QATLayer,
    quantizer: str,
    parts: tuple[Factors, Tensor, Tensor | None, LayerRecord],
    batch_norm: nn.Module | None,
    dequant_bits: int,
) -> Product:
    factors, scale_w, bias, record = parts
    layout = cast(WeightQuantizer, getattr(layer, quantizer)).layout
    weight = folded_weight(current_weight(layer, layer.weight_quantizers[quantizer]), batch_norm)
    channels = int(bias.numel()) if bias is not None else _channels(layer, weight)
    fitting = (weight.numel() // layout.group_size,) if layout.group_size else (1, channels)
    if scale_w.numel() not in fitting:
        raise ValueError(
            f"The record has {scale_w.numel()} weight scales for layer '{name}', which has {channels} output channels"
            f"{f' in groups of {layout.group_size}' if layout.group_size else ''}. "
            "It is the record of another model; take that of this one (QuantRecord.from_model(model).save(...))."
        )
    codes = weight_codes(weight, scale_w, layout, _BITS[record.wts_type])
    whole = dequant_scale(torch.tensor(factors.scale), scale_w)
    kept = dequant_scale(torch.tensor(factors.scale), scale_w, dequant_bits)
    return Product(
        codes=codes.to(torch.int8).numpy(),
        scale_w=(scale_w if dequant_bits >= 32 else kept / factors.scale.item()).numpy(),
        type=record.wts_type,
        dequant=kept.numpy(),
        bias=None if bias is None or layout.group_size else _int32(name, bias_codes(bias, whole)),
        float_bias=None if bias is None else bias.numpy(),
        group_size=layout.group_size,
    )


def _channels(layer: QATLayer, weight: Tensor) -> int:
    kind = LAYER_TYPES[supported_class(layer)]
    return cast(int, layer.out_channels) if kind.transposed else weight.shape[0]


def _in_torch_order(scale: Tensor, gates: tuple[int, ...]) -> Tensor:
    """Bring the scales of a recurrent layer from the order of the record to that of the weight; equal ones are one."""
    by_gate = scale.view(len(gates), -1)
    ordered = torch.empty_like(by_gate)
    ordered[list(gates)] = by_gate
    flat = ordered.flatten()
    return flat[:1] if flat.numel() == len(gates) and bool((flat == flat[0]).all()) else flat


def _int32(name: str, values: Tensor) -> Array:
    if bool((values.abs() >= _INT32_END).any()):
        raise RuntimeError(
            f"Do bias quantize failed. The bias of layer '{name}' is {values.abs().max().item():.3g} in units of "
            "scale_w * scale_d, which does not fit into 32 bits. Its weights or its inputs are tiny beside the bias: "
            "give a larger clip_max, or leave the layer in float (retrain_enable: false, skip_layers)."
        )
    return values.to(torch.int32).numpy()
