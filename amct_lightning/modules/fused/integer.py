"""The forward of a layer in real integers, with what backward needs to rebuild the fake-quantized values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_lightning.modules.integer import Numbers, PackedWeight, integer_forward, why_not
from amct_lightning.modules.integer.codes import unsigned_codes
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer
from amct_lightning.quantizers.executors import Executor, Factors, WeightFactors
from amct_lightning.quantizers.rangeless import RangelessQuantizer

PACKED = "_amct_packed"
"""Where a layer keeps its packed weight."""


def reason_against(layer: Any, device: torch.device) -> str | None:
    """Say why a quantized layer cannot be computed in integers on a device, or ``None`` if it can.

    Args:
        layer: The quantized layer.
        device: The device.
    """
    if layer.has_grid:
        return f"{'deploy_grid=True' if layer.serving is None else 'target serving'} computes with its integers already"
    if isinstance(layer.input_quantizer, RangelessQuantizer):
        return layer.input_quantizer.why_no_integers
    if layer.weight_quantizer.layout.group_size:
        return "its weight has a scale per group of inputs, integer operators take one per output channel"
    return why_not(layer, device, (layer.input_quantizer.num_bits, layer.weight_quantizer.num_bits))


class IntegerProduct:
    """The product of a layer in integers.

    Args:
        layer: The layer, which :func:`reason_against` says nothing against.
        dtype: Dtype of the output; ``None`` for that of the input.
    """

    def __init__(self, layer: Any, dtype: torch.dtype | None) -> None:
        self.layer = layer
        self.dtype = dtype

    def forward(
        self,
        executor: Executor,
        quantizers: tuple[ActivationQuantizer, WeightQuantizer],
        tensors: tuple[Tensor, Tensor, Tensor | None],
        observe: bool,
    ) -> tuple[Tensor, Factors, WeightFactors]:
        """Return the output and what input and weight were quantized with.

        Args:
            executor: What runs the formulas of the quantizers.
            quantizers: Those of input and weight.
            tensors: Input, weight and bias.
            observe: Whether a calibrating quantizer counts the input as a batch.
        """
        x, weight, bias = tensors
        codes, factors = executor.input_codes(quantizers[0], x, observe)
        weight_factors = executor.weight_factors(quantizers[1], weight)
        bits, scales = (factors.num_bits, weight_factors.num_bits), weight_factors.scale.flatten()
        numbers = Numbers(factors.scale, factors.offset, scales, bits, quantizers[0].fixed_min)

        def to_codes(values: Tensor, scale: Tensor, offset: Tensor, num_bits: int) -> Tensor:
            """Return the codes that are there, unless a convolution reads only some of the points."""
            known = codes is not None and values.shape == x.shape
            return codes if known else unsigned_codes(values, scale, offset, num_bits)  # type: ignore[return-value]

        packed = self.layer.__dict__.setdefault(PACKED, PackedWeight())
        output = integer_forward(self.layer, x, weight, bias, numbers, packed, self.dtype, to_codes)
        return output, factors, weight_factors
