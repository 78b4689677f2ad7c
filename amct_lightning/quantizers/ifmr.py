"""IFMR calibration: find the clip range that loses least over a few batches of activations.

The search tries scaled copies of the observed range and keeps the one with the smallest mean squared error. All
candidates are tried at once on pieces of the data, so that neither a copy of the batches nor a tensor of
candidates x values is ever made. Values are clamped before they are divided, not after, and offsets are rounded before
the integer range is shifted: AMCT's search does both in this order, and the last bits show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import (
    EPS,
    activation_scale_offset,
    half_range,
    range_ends,
    usable_scale,
)
from amct_lightning.quantizers.functions.weight import symmetric_divisor

_ELEMENTS_AT_ONCE = 1 << 20
"""Candidates x values held at once; 4 MiB of float32 stays in the caches of a CPU core."""

_PERCENTILE = 0.999999


class IfmrResult(NamedTuple):
    """Outcome of :func:`ifmr`; all tensors are float32, 0-d unless said otherwise.

    Attributes:
        scale: Best scale.
        offset: Its offset, 0 in the symmetric mode.
        clip_max: Upper clip of the best scale.
        clip_min: Lower clip of the best scale.
        losses: Mean squared error of every candidate, 1-d.
        degenerate: 1 if the values are so small that the scale is 1 in place of their own, else 0.
    """

    scale: Tensor
    offset: Tensor
    clip_max: Tensor
    clip_min: Tensor
    losses: Tensor
    degenerate: Tensor


def ifmr(
    batches: Sequence[Tensor],
    num_bits: int,
    *,
    symmetric: bool = True,
    max_percentile: float = _PERCENTILE,
    min_percentile: float = _PERCENTILE,
    search: tuple[float, float, float] = (0.7, 1.3, 0.01),
) -> IfmrResult:
    """Search the clip range with the smallest quantization error.

    Args:
        batches: Observed activations, any shapes, on one device. They are read, not copied.
        num_bits: 4, 8 or 16.
        symmetric: Search a range around 0 (what QAT uses); else between the observed minimum and the candidate.
        max_percentile: Share of the values that the upper end of the range must reach.
        min_percentile: Share of the values that the lower end must reach.
        search: Start, end and step of the ratios by which the observed range is scaled.

    Returns:
        The best scale, offset and clips, and the loss of every candidate.

    Raises:
        ValueError: If there are no values.

    Example:
        >>> result = ifmr([torch.tensor([-1.0, 0.2, 0.9])], 8)
        >>> round(result.clip_min.item() / result.scale.item())
        -128
    """
    values = [batch.detach().reshape(-1).float() for batch in batches if batch.numel()]
    if not values:
        raise ValueError("Calibration got no values: every observed batch is empty.")
    upper, lower = _ends(values, max_percentile, min_percentile)
    if symmetric:
        ends = upper.abs(), lower.abs()
        high = _scaled(torch.maximum(*ends), search)
        low, scale = -high, usable_scale(high / symmetric_divisor(*ends, num_bits))
    else:
        high = _scaled(upper, search)
        low = lower.expand_as(high)
        scale, _ = activation_scale_offset(high, low, num_bits)
    losses = _losses(values, high, low, scale)
    chosen = losses.argmin().view(1)
    best = scale.index_select(0, chosen).squeeze(0)
    offset = torch.zeros_like(best) if symmetric else -torch.round(lower / best) - half_range(num_bits)
    # Only a scale of 1 in place of one that is too small is larger than the range itself.
    degenerate = torch.maximum(high, -low).index_select(0, chosen).squeeze(0) < best
    return IfmrResult(best, offset, *range_ends(best, num_bits, offset), losses, degenerate.float())


def has_values(values: Tensor, num_bits: int) -> bool:
    """Tell whether values are large enough for a range of their own; the host waits for the answer.

    Args:
        values: Activations of any shape, not empty.
        num_bits: 4, 8 or 16.

    Example:
        >>> has_values(torch.zeros(3), 8), has_values(torch.full((3,), 1e-8), 8), has_values(torch.ones(3), 8)
        (False, False, True)
    """
    upper, lower = _ends([values.detach().reshape(-1).float()], _PERCENTILE, _PERCENTILE)
    return bool(torch.maximum(upper, -lower) >= half_range(num_bits) * EPS)


def _ends(values: Sequence[Tensor], max_percentile: float, min_percentile: float) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower end of the values, not below and not above 0."""
    upper = _kth_largest(values, max_percentile).clamp(min=0)
    return upper, -_kth_largest([-v for v in values], min_percentile).clamp(min=0)


def _scaled(end: Tensor, search: tuple[float, float, float]) -> Tensor:
    """Return an end of the range times all ratios, 1-d."""
    # The ratios are the numbers that torch gives on a CPU. They reach the device as arguments of an operator: a copy of
    # a tensor would stop the host until the device has done all that it was given before.
    ratios = torch.arange(*search, dtype=torch.float32, device="cpu").tolist()
    return torch.stack(torch._foreach_mul([end] * len(ratios), ratios))


def _kth_largest(values: Sequence[Tensor], percentile: float) -> Tensor:
    total = sum(v.numel() for v in values)
    k = 1 if 1 - percentile < EPS else total - int(percentile * total)
    if k <= 1:
        return torch.stack([v.amax() for v in values]).amax()
    top = torch.cat([v.topk(min(k, v.numel())).values for v in values])
    return top.topk(k).values[-1]


def _losses(values: Sequence[Tensor], high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    high, low, scale = high.unsqueeze(1), low.unsqueeze(1), scale.unsqueeze(1)
    at_once = max(1, _ELEMENTS_AT_ONCE // high.numel())
    sums = []
    for value in values:
        for piece in value.split(at_once):
            error = torch.clamp(piece, low, high).div_(scale).round_().mul_(scale).sub_(piece)
            sums.append(error.square_().sum(dim=1))
    return torch.stack(sums).sum(dim=0) / sum(v.numel() for v in values)
