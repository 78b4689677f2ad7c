"""The weight scales of the deployed layer: those of the weight, times what folding a BatchNorm will multiply it by."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from amct_lightning.quantizers import WeightQuantizer
from amct_lightning.quantizers.functional import EPS


@torch.no_grad()
def deployed_scale(quantizer: WeightQuantizer, weight: Tensor, batch_norm: nn.Module | None) -> Tensor:
    """Return ``|s * gamma / sqrt(running_var + eps)|``, or ``s`` without a BatchNorm; below ``EPS`` it is 1.

    Args:
        quantizer: The quantizer of the weight.
        weight: The weight as it is now.
        batch_norm: The BatchNorm that is folded into the layer, if any.

    Returns:
        Scales, 1-d float32: with a BatchNorm always one per output channel.

    Example:
        >>> from amct_lightning.quantizers import ChannelLayout
        >>> weight = torch.tensor([[1.27], [2.54]])
        >>> quantizer = WeightQuantizer(8, channel_wise=True, layout=ChannelLayout(), weight=weight)
        >>> deployed_scale(quantizer, weight, None)
        tensor([0.0100, 0.0200])
    """
    scale = quantizer.compute_scale(weight)
    if batch_norm is not None:
        variance = cast(Tensor, batch_norm.running_var).float()
        factor = torch.rsqrt(variance + cast(float, batch_norm.eps))
        if batch_norm.weight is not None:
            factor = cast(Tensor, batch_norm.weight).float() * factor
        scale = scale.to(factor.device).abs() * factor.abs()
    return torch.where(scale < EPS, 1.0, scale)
