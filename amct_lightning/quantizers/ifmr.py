"""IFMR calibration: find the clip range that loses least over a few batches of activations.

The search tries scaled copies of the observed range and keeps the one with the smallest mean squared error. All
candidates are tried at once on pieces of the data, so that neither a copy of the batches nor a tensor of
candidates x values is ever made. Values are clamped before they are divided, not after, and offsets are rounded before
the integer range is shifted: AMCT's search does both in this order, and the last bits show it.

Trying a candidate costs six operations for each value, and there are 61 of them. On the CPU a histogram first tells
between which bounds the error of each candidate lies, rounding included, and only those are tried that may be the best
one: mostly one to three. The outcome is that of trying them all, to the bit. Other devices, where it would take float64
and the host would have to wait for the answer, try them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

_IN_CACHE = 1 << 17
"""Candidates x values held at once on the CPU; 512 KiB of float32 stays in the second cache of a core."""

_ON_DEVICE = 1 << 22
"""The same on another device, where an operator on less would take no longer than its launch."""

_PERCENTILE = 0.999999

_BINS = 1 << 14
"""Of the histogram: the width of its bins goes into the bounds as a square, its size into its cost."""

_ROW = 1 << 10
"""Values in a row, of which only the outermost one is looked at first."""

_UNIT_ROUNDOFF = 2.0**-24
"""Of float32: the largest relative error of one operation."""

_HISTOGRAM_PAYS = 1 << 15
"""Number of values from which the histogram costs less than trying all candidates."""

_MOST_SQUARES = 1e30
"""Largest sum of squares that bounds are computed for; above 1e38 the errors themselves overflow."""

_SUM_ERROR = 1e-4
"""More than a float32 sum of squares, in the order of torch's sums, is ever wrong by, relative to itself."""


class IfmrResult(NamedTuple):
    """Outcome of :func:`ifmr`; all tensors are float32, 0-d unless said otherwise.

    Attributes:
        scale: Best scale.
        offset: Its offset, 0 in the symmetric mode.
        clip_max: Upper clip of the best scale.
        clip_min: Lower clip of the best scale.
        losses: Mean squared error of every candidate, 1-d; infinity for those that were not tried because another one
            is better for certain.
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
        batches: Observed activations, any shapes and floating dtype, on one device. They are read, not copied. NaN and
            infinity count as 0.
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
    values = [batch.detach().reshape(-1) for batch in batches if batch.numel()]
    if not values:
        raise ValueError("Calibration got no values: every observed batch is empty.")
    upper, lower = ends(values, max_percentile, min_percentile)
    if symmetric:
        sizes = upper.abs(), lower.abs()
        high = _scaled(torch.maximum(*sizes), search)
        low, scale = -high, usable_scale(high / symmetric_divisor(*sizes, num_bits))
        losses = _symmetric_losses(values, high, scale, num_bits)
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
    upper, lower = ends([values.detach().reshape(-1)], _PERCENTILE, _PERCENTILE)
    return bool(torch.maximum(upper, -lower) >= half_range(num_bits) * EPS)


def ends(values: Sequence[Tensor], max_percentile: float, min_percentile: float) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower end of the values, not below and not above 0.

    Args:
        values: The values, 1-d tensors that are not empty.
        max_percentile: Share of the values that the upper end reaches.
        min_percentile: Share of the values that the lower end reaches.

    Example:
        >>> ends([torch.tensor([-2.0, 0.5, 3.0])], 1.0, 1.0)
        (tensor(3.), tensor(-2.))
    """
    upper = _kth(values, max_percentile, largest=True)
    return upper.clamp(min=0), _kth(values, min_percentile, largest=False).clamp(max=0)


def _scaled(end: Tensor, search: tuple[float, float, float]) -> Tensor:
    """Return an end of the range times all ratios, 1-d."""
    # The ratios are the numbers that torch gives on a CPU. They reach the device as arguments of an operator: a copy of
    # a tensor would stop the host until the device has done all that it was given before.
    ratios = torch.arange(*search, dtype=torch.float32, device="cpu").tolist()
    return torch.stack(torch._foreach_mul([end] * len(ratios), ratios))


def _kth(values: Sequence[Tensor], percentile: float, largest: bool) -> Tensor:
    """Return the value that a share of the values does not exceed, or does not fall below; 0-d."""
    total = sum(v.numel() for v in values)
    k = 1 if 1 - percentile < EPS else total - int(percentile * total)
    extreme = torch.amax if largest else torch.amin
    if k <= 1:
        return extreme(torch.stack([extreme(piece) for piece in _pieces(values)]))
    return torch.cat([_outermost(v, k, largest) for v in values]).topk(k, largest=largest).values[-1]


def _outermost(values: Tensor, k: int, largest: bool) -> Tensor:
    """Return the ``k`` largest or smallest values, 1-d, or all if there are fewer."""
    whole = values.numel() - values.numel() % _ROW
    if whole > k * _ROW:
        # They are in the k rows with the largest ones: reading each value once is several times faster than topk.
        extreme = torch.amax if largest else torch.amin
        rows = torch.cat([extreme(piece.view(-1, _ROW), dim=1) for piece in _pieces([values[:whole]])])
        found = values[:whole].view(-1, _ROW).index_select(0, rows.topk(k, largest=largest).indices)
        values = torch.cat([found.view(-1), values[whole:]])
    return _finite(values).topk(min(k, values.numel()), largest=largest).values


def _pieces(values: Sequence[Tensor], parts: int = 1) -> Iterator[Tensor]:
    """Yield the values in pieces of a size of which ``parts`` are fast to work on; each piece is a copy."""
    at_once = max(1, (_IN_CACHE if values[0].device.type == "cpu" else _ON_DEVICE) // parts)
    return (_finite(piece) for value in values for piece in value.split(at_once))


def _finite(values: Tensor) -> Tensor:
    return values.float().nan_to_num(0.0, 0.0, 0.0)


def _symmetric_losses(values: Sequence[Tensor], high: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Return the mean squared errors of ranges around 0, infinity for those that cannot be the smallest."""
    bounded = values[0].device.type == "cpu" and num_bits <= 8 and sum(v.numel() for v in values) >= _HISTOGRAM_PAYS
    tried = _contenders(values, high, scale) if bounded else None
    if tried is None:
        return _losses(values, high, None, scale)
    losses = torch.full_like(high, math.inf)
    losses[tried] = _losses(values, high[tried], None, scale[tried])
    return losses


def _losses(values: Sequence[Tensor], high: Tensor, low: Tensor | None, scale: Tensor) -> Tensor:
    """Return the mean squared errors of ranges; without ``low`` they are around 0, where the sign does not matter."""
    high, low, scale = high.unsqueeze(1), None if low is None else low.unsqueeze(1), scale.unsqueeze(1)
    sums = []
    for piece in _pieces(values, len(high)):
        # Two operators are faster than a clamp with two tensors, which torch does not do with vectors.
        clamped = torch.minimum(piece.abs_() if low is None else piece, high)
        if low is not None:
            clamped = torch.maximum(clamped, low)
        error = clamped.div_(scale).round_().mul_(scale).sub_(piece)
        sums.append(error.square_().sum(dim=1))
    return torch.stack(sums).sum(dim=0) / sum(v.numel() for v in values)


def _contenders(values: Sequence[Tensor], high: Tensor, scale: Tensor) -> Tensor | None:
    """Return which candidates may have the smallest loss, 1-d indices; ``None`` if there are no bounds for such values.

    The errors of a candidate follow from how many values are above each of the limits between two integers, and from
    their sum: a value above ``(k + 1/2) s`` is rounded to one integer more. The histogram knows both for the edge of a
    bin next to the limit. What lies between the two is counted for the wrong one of two integers, which is worth
    ``2 s`` times its distance from the limit. To this come the roundings of the search itself.
    """
    top, integers = float(high.amax()), torch.round(high / scale)
    if not (0 < top < _MOST_SQUARES and bool((integers == integers[0]).all())):
        return None  # some scales are 1 because their ranges are too small
    steps, histogram = int(integers[0]), _histogram(values, top)
    if histogram is None:
        return None
    squares, above, sum_above = histogram
    wide, width, step = scale.double().unsqueeze(1), top / _BINS, torch.arange(steps, dtype=torch.float64)
    limits = wide * (step + 0.5)
    edges = (limits / width).round_().long().clamp_(max=_BINS + 2)
    loss = squares + (wide * wide * (2 * step + 1) * above[edges] - 2 * wide * sum_above[edges]).sum(dim=1)
    # Dividing, and finding the bin, may move a value over a limit or an edge that is as near as this.
    near = (limits - edges * width).abs_() + 4 * _UNIT_ROUNDOFF * top
    doubt = (2 * wide * near * (above[edges - 1] - above[edges + 1])).sum(dim=1)
    most = (loss + doubt).clamp_(min=0)
    product, total = 2 * _UNIT_ROUNDOFF * top, float(above[0])  # by which integer times scale is rounded, at most
    radius = doubt + 2 * product * (total * most).sqrt() + total * product**2 + _SUM_ERROR * most
    return (loss - radius <= (loss + radius).min()).nonzero().squeeze(1)


def _histogram(values: Sequence[Tensor], top: float) -> tuple[float, Tensor, Tensor] | None:
    """Return the sum of squares and, for each edge of a bin, the number and the sum of the magnitudes above it.

    There are ``_BINS`` bins up to ``top`` and one for what is larger; three more edges have nothing above them.
    ``None`` if the values are too large.
    """
    table = torch.zeros(2, _BINS + 4, dtype=torch.float64)
    squares = 0.0
    for piece in _pieces(values):
        wide = piece.abs_().double()
        squares += float(torch.dot(wide, wide))
        if squares > _MOST_SQUARES:
            return None
        bins = piece.mul_(_BINS / top).clamp_(max=_BINS).int()
        table[0, : _BINS + 1] += torch.bincount(bins, minlength=_BINS + 1)
        table[1, : _BINS + 1] += torch.bincount(bins, weights=wide, minlength=_BINS + 1)
    above, sum_above = table.flip(1).cumsum(1).flip(1)
    return squares, above, sum_above
