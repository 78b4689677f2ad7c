"""The weight scale with the least squared error, as a share of the max-abs one (``init: mse``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import dequantize_, quantize, usable_scale
from amct_lightning.quantizers.functions.weight import ChannelLayout, arq_scale

RATIOS = tuple(percent / 100 for percent in range(99, 19, -1))
"""What is tried besides the max-abs scale itself, which stays where nothing is better."""

_AT_ONCE = 1 << 17
"""Weights that are tried at once on the CPU: with their copy they stay in the second cache of a core."""


@torch.no_grad()
def least_error_ratio(weight: Tensor, layout: ChannelLayout, num_bits: int, channel_wise: bool) -> Tensor:
    """Return by what the max-abs scales of a weight are multiplied so that its squared error is least, 1-d float32.

    Each scale is searched on its own, among the ratios 1.00, 0.99, ... 0.20. The host waits for nothing, and beside the
    weight there is one copy of a piece of it.

    Args:
        weight: The weight, of any floating dtype.
        layout: Where its output channels are.
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.

    Example:
        >>> weight = torch.tensor([[1.0] + [0.26] * 30, [0.7, 0.1] + [0.0] * 29])
        >>> least_error_ratio(weight, ChannelLayout(), 4, True)
        tensor([0.9400, 1.0000])
    """
    values = weight.detach().float()
    view = layout.view(values)
    dims = layout.reduced_dims(view, channel_wise)
    scale = arq_scale(values, layout, num_bits, channel_wise)
    found = [_searched(*piece, dims, num_bits) for piece in _pieces(view, scale)]
    return torch.cat(found).flatten()


def _pieces(view: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight in pieces with their scales, whole if the first axis has one scale."""
    rows = view.shape[0]
    if view.device.type == "cpu" and scale.shape[0] == rows:
        rows = max(1, _AT_ONCE * rows // max(1, view.numel()))
    return zip(view.split(max(1, rows)), scale.split(max(1, rows)), strict=False)


def _searched(view: Tensor, widest: Tensor, dims: tuple[int, ...], num_bits: int) -> Tensor:
    best, least = torch.ones_like(widest), _error(view, widest, dims, num_bits)
    for ratio in RATIOS:
        error = _error(view, usable_scale(widest * ratio), dims, num_bits)
        better = error < least
        best = best.masked_fill(better, ratio)
        least = torch.minimum(error, least)
    return best


def _error(view: Tensor, scale: Tensor, dims: tuple[int, ...], num_bits: int) -> Tensor:
    error = dequantize_(quantize(view, scale, num_bits), scale).sub_(view)
    return error.square_().sum(dims, keepdim=True)
