"""What tensors were quantized with, and what came of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers.executors.table import FactorTable
from amct_lightning.quantizers.functional import usable_scale
from amct_lightning.quantizers.functions.activation import Ends
from amct_lightning.quantizers.functions.weight import ChannelLayout
from amct_lightning.quantizers.weight import LearnedWeightQuantizer, WeightQuantizer


class Factors(NamedTuple):
    """What a tensor was quantized with, single numbers on its device.

    Attributes:
        upper: Upper clip, 0-d float32.
        lower: Lower clip, 0-d float32.
        scale: Scale, 0-d float32.
        offset: Offset, an integer, 0-d float32.
        num_bits: Number of bits.
        ends: What the gradients need beside them, if it is known.
        table: Where they come from, if that is a table.
        dtype: Dtype in which a server quantizes with them, ``None`` if none does.
    """

    upper: Tensor
    lower: Tensor
    scale: Tensor
    offset: Tensor
    num_bits: int
    ends: Ends | None = None
    table: FactorTable | None = None
    dtype: torch.dtype | None = None


class WeightFactors(NamedTuple):
    """What a weight was quantized with.

    Attributes:
        scale: Scale, float32, shaped to broadcast over ``layout.view(weight)``.
        layout: Where the output channels are.
        num_bits: Number of bits.
        gradient_factor: By what the gradient of a learned scale is normalized; 0 for a scale that is not learned.
    """

    scale: Tensor
    layout: ChannelLayout
    num_bits: int
    gradient_factor: float


class GridWeight(NamedTuple):
    """A weight on the device's grid, and what the sums of its products are multiplied by.

    Attributes:
        codes: The integers, float32.
        factors: What the weight was quantized with.
        scale: The product of the scales of input and weight, 1-d float32.
        kept: What the hardware keeps of it.
    """

    codes: Tensor
    factors: WeightFactors
    scale: Tensor
    kept: Tensor


def on_device(factors: WeightFactors) -> WeightFactors:
    """Return the factors of a weight as the device has them: a learned scale that it cannot use is 1 in the record.

    Args:
        factors: What the weight was quantized with.
    """
    return factors if not factors.gradient_factor else factors._replace(scale=usable_scale(factors.scale))


def gradient_factor_of(quantizer: WeightQuantizer) -> float:
    """Return by what the gradient of a learned scale is normalized; 0 for a scale that is not learned.

    Args:
        quantizer: The quantizer of the weight.
    """
    return quantizer.gradient_factor if isinstance(quantizer, LearnedWeightQuantizer) else 0.0
