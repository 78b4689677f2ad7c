"""What a server loads of a layer: the very numbers that the layer computes with when it is evaluated."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from amct_lightning.modules.deployed import LARGEST_BIAS, bias_codes, scales_of_sums, weight_codes
from amct_lightning.modules.folding import current_weight, deployed_scale
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.functional import kept_bits


class ServingFactors(NamedTuple):
    """The tensors of a linear layer of the type ``W8A8``, with ``n`` outputs and ``k`` inputs, on the layer's device.

    Attributes:
        input_scale: Scale of the input, 0-d float32; ``dtype`` holds it.
        input_offset: Offset of the input, an integer from -128 to 127, 0-d float32.
        weight: Integers of the weight, int8 ``(n, k)``.
        weight_scale: Scales of the weight, float32 ``(n,)``.
        deq_scale: By what the sums are multiplied, float32 ``(n,)``; for float16 the 19 bits that the hardware keeps.
        quant_bias: What is added to the sums, int32 ``(n,)``: the bias, and what the offset of the input adds to a sum.
        dtype: Dtype that the server has.
    """

    input_scale: Tensor
    input_offset: Tensor
    weight: Tensor
    weight_scale: Tensor
    deq_scale: Tensor
    quant_bias: Tensor
    dtype: torch.dtype


@torch.no_grad()
def serving_factors(layer: QATLayer) -> ServingFactors:
    """Return what a server loads of a layer, in exactly the values that the forward of an evaluation uses.

    ``quant_bias = round(bias / deq_scale) - input_offset * sum_k(weight)``, of which the first part is kept within
    2**30: that is too little for the bias of an output whose weights are next to nothing, and a warning says so. Of a
    weight that is sharded the whole is gathered, so that all ranks have to call this.

    Args:
        layer: A layer that was converted with ``target="serving"``.

    Raises:
        ValueError: If it was not, or if it is not calibrated.

    Example:
        >>> from amct_lightning import calibrate, prepare_qat
        >>> model = prepare_qat(torch.nn.Sequential(torch.nn.Linear(4, 2)), None, torch.ones(1, 4), target="serving")
        >>> calibrate(model, [torch.linspace(-1, 1, 8).view(2, 4)])
        >>> factors = serving_factors(model[0])
        >>> factors.input_scale, factors.weight.dtype, factors.quant_bias.shape
        (tensor(0.0095), torch.int8, torch.Size([2]))
    """
    dtype, quantizer = layer.serving, layer.input_quantizer
    if dtype is None:
        raise ValueError(
            f"This {type(layer).__name__} computes as no server does. Convert the model with target='serving', INT8 "
            "activations and weights and no weights in groups."
        )
    if not quantizer.has_range:
        raise ValueError(
            f"This {type(layer).__name__} is not calibrated yet. Train it for a few batches, or call "
            "amct_lightning.calibrate(model, batches)."
        )
    scale, offset = quantizer.scale, quantizer.offset
    weight, weights = current_weight(layer), layer.weight_quantizer
    scale_w = deployed_scale(weights, weight, None)
    codes = weight_codes(weight.float(), scale_w, weights.layout, weights.num_bits).to(torch.int8)
    scale_w = scale_w.expand(codes.shape[0]).contiguous()
    product = scale_w * scale
    deq_scale = scales_of_sums(product, kept_bits(product), dtype)[1]
    added = codes.sum(1, dtype=torch.int64) * -offset.to(torch.int64)
    bias = current_weight(layer, "bias") if layer.bias is not None else None
    if bias is not None:
        of_bias = bias_codes(bias.float(), deq_scale, served=True)
        _warn_of_large(int((of_bias.abs() >= LARGEST_BIAS).sum()), len(codes), layer)
        added += of_bias.to(torch.int64)
    return ServingFactors(scale, offset + 0.0, codes, scale_w, deq_scale, added.to(torch.int32), dtype)


def _warn_of_large(count: int, outputs: int, layer: QATLayer) -> None:
    if count:
        warnings.warn(
            f"The bias of {count} of {outputs} outputs of a {type(layer).__name__} is too large for the 32 bits of its "
            "sums, whose scale is very small there, so that it is cut off, in training as well: the weights of these "
            "outputs are next to nothing. One scale for all outputs (channel_wise: false) helps.",
            stacklevel=3,
        )
