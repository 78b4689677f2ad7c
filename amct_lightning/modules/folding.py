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
            factor = current_weight(batch_norm).float() * factor
        scale = scale.to(factor.device).abs() * factor.abs()
    return torch.where(scale < EPS, 1.0, scale)


@torch.no_grad()
def current_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight as it is now, also of a layer that ``torch.nn.utils.prune`` has pruned.

    Such a layer has the parameter ``weight_orig`` and the buffer ``weight_mask``; its ``weight`` is their product at
    the beginning of the last forward, before the optimizer's last step.

    Args:
        layer: The layer.
        name: Name of the weight.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(2, 1), "weight", amount=1)
        >>> _ = nn.init.constant_(layer.weight_orig, 5.0)
        >>> sorted(current_weight(layer).flatten().tolist())
        [0.0, 5.0]
    """
    original = layer._parameters.get(f"{name}_orig")
    mask = layer._buffers.get(f"{name}_mask")
    if original is None or mask is None:
        return cast(Tensor, getattr(layer, name))
    return original * mask.to(original.dtype)
