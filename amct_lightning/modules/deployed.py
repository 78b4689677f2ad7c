"""What a deployed layer computes with: integer weights and biases, and the scale of its sums.

The formulas are AMCT's. ``export/`` writes their results into files; a model on the device's grid trains with them.
All are tensors on the layer's device, and nothing is read on the host.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from amct_lightning.modules.folding import current_weight, fold_factor
from amct_lightning.quantizers import ChannelLayout
from amct_lightning.quantizers.functional import kept_bits, quantize

DEVICE_BITS = 19
"""Bits of a float32 dequantization scale that the hardware keeps."""

LARGEST_BIAS = 2**30
"""The largest integer bias on a server; with sums of up to 2**15 products of INT8 its 32 bits hold what comes of it."""


@torch.no_grad()
def folded_weight(weight: Tensor, batch_norm: nn.Module | None) -> Tensor:
    """Return the weight of a convolution with its BatchNorm folded in.

    Args:
        weight: The weight, output channel first if there is a BatchNorm.
        batch_norm: The BatchNorm, or ``None`` for the weight as it is.

    Returns:
        The weight, float32.

    Example:
        >>> norm = nn.BatchNorm1d(2, eps=0.0)
        >>> _ = norm.running_var.fill_(4.0)
        >>> folded_weight(torch.tensor([[2.0], [4.0]]), norm).flatten()
        tensor([1., 2.])
    """
    weight = weight.float()
    if batch_norm is None:
        return weight
    return weight * fold_factor(batch_norm).view(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def folded_bias(bias: Tensor | None, batch_norm: nn.Module | None) -> Tensor | None:
    """Return the bias of a layer with its BatchNorm folded in: ``beta + (bias - mean) * gamma / sqrt(var + eps)``.

    Args:
        bias: The bias, 1-d, if the layer has one.
        batch_norm: The BatchNorm, or ``None`` for the bias as it is.

    Returns:
        The bias, float32; ``None`` if there is neither.

    Example:
        >>> folded_bias(torch.ones(2), nn.BatchNorm1d(2, eps=0.0))
        tensor([1., 1.])
    """
    if batch_norm is None:
        return None if bias is None else bias.float()
    mean = cast(Tensor, batch_norm.running_mean).float()
    shifted = (-mean if bias is None else bias.float() - mean) * fold_factor(batch_norm)
    return shifted if batch_norm.bias is None else current_weight(batch_norm, "bias").float() + shifted


@torch.no_grad()
def weight_codes(weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int) -> Tensor:
    """Return the integers of a weight, ``clamp(round(w/s), -h, h-1)``, in float32.

    Args:
        weight: The weight with its BatchNorm folded in, float32, as the float layer lays it out.
        scale: Its scales, 1-d float32: one per output channel, or a single one.
        layout: Where the output channels are.
        num_bits: 4 or 8.

    Returns:
        The integers, shape of ``weight``.

    Example:
        >>> weight_codes(torch.tensor([[1.0, -9.0]]), torch.tensor([0.5]), ChannelLayout(), 4)
        tensor([[ 2., -8.]])
    """
    view = layout.view(weight)
    return quantize(view, layout.spread(scale, view, scale.numel() > 1), num_bits).view_as(weight)


@torch.no_grad()
def bias_codes(bias: Tensor, scale: Tensor, served: bool = False) -> Tensor:
    """Return the integers of a bias, ``round(bias / s)``, in float32.

    Args:
        bias: The bias with the BatchNorm folded in, 1-d float32.
        scale: The dequantization scale, see :func:`dequant_scale`, of 32 bits.
        served: Whether it is for a server, which adds it in 32 bits: it is kept within :data:`LARGEST_BIAS`.

    Example:
        >>> bias_codes(torch.tensor([1.2, -0.7]), torch.tensor([0.5]))
        tensor([ 2., -1.])
    """
    codes = torch.round(bias / scale)
    return codes.clamp_(-LARGEST_BIAS, LARGEST_BIAS) if served else codes


def scales_of_sums(scale: Tensor, kept: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return by what a bias is divided to become integers, and by what sums are multiplied.

    A compiled network divides by the number as it is. A server divides by what it multiplies with: the number as it is
    for bfloat16, and what the hardware keeps of it for float16.

    Args:
        scale: The product of the scales of input and weight, float32.
        kept: What the hardware keeps of it.
        dtype: Dtype that a server computes with; ``None`` for a compiled network.
    """
    if dtype is None:
        return scale, kept
    return (kept, kept) if dtype == torch.float16 else (scale, scale)


@torch.no_grad()
def dequant_scale(scale_d: Tensor, scale_w: Tensor, bits: int = 32) -> Tensor:
    """Return by what the hardware multiplies the int32 sums of a layer: ``scale_d * scale_w``.

    The hardware keeps the top 19 bits of the float32 number (``aclnnTransQuantParamV2``).

    Args:
        scale_d: Scale of the input, 0-d float32.
        scale_w: Scales of the weight, 1-d float32.
        bits: 32 for the number as it is, 19 for what the hardware keeps of it.

    Returns:
        The scales, 1-d float32.

    Example:
        >>> dequant_scale(torch.tensor(0.1), torch.tensor([0.3]), bits=19).item()
        0.029998779296875
    """
    scale = scale_w * scale_d
    return scale if bits >= 32 else kept_bits(scale)
