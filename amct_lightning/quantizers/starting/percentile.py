"""A calibrated range with a given share of the values inside (``init: percentile``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import EPS, half_range
from amct_lightning.quantizers.ifmr import ends


@torch.no_grad()
def percentile_range(
    batches: Sequence[Tensor], num_bits: int, percentile: float, fixed_min: bool = False, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the range that at least a share of the values is inside of; both ends are found on their own.

    Each end leaves out up to half of the rest, and the upper end of a range that begins with 0 all of it. A range
    around 0 takes the larger of the two ends. No more than the values left out is sorted, and nothing is read.

    Args:
        batches: Observed activations, any shapes and floating dtype, on one device. NaN and infinity count as 0.
        num_bits: 4, 8 or 16.
        percentile: The share of the values, in percent.
        fixed_min: Whether the range begins with 0.
        symmetric: Whether it is one around 0.

    Returns:
        Upper and lower clip, and 1 if there are no values to make a range of, else 0; 0-d float32. If so many values
        are 0 that the share alone gives no range, it is that of all values.

    Example:
        >>> upper, lower, _ = percentile_range([torch.arange(-100.0, 301)], 8, 99)
        >>> upper, lower
        (tensor(298.), tensor(-98.))
    """
    values = [batch.detach().reshape(-1) for batch in batches if batch.numel()]
    share = 1 - (100 - percentile) / (100 if fixed_min else 200)
    upper, lower = _range(values, share, fixed_min, symmetric)
    widest = _range(values, 1.0, fixed_min, symmetric)
    levels = 2**num_bits - 1
    none = (upper - lower) / levels < EPS
    upper, lower = torch.where(none, widest[0], upper), torch.where(none, widest[1], lower)
    none = (upper - lower) / levels < EPS
    h = half_range(num_bits)
    return upper.masked_fill(none, h - 1), lower.masked_fill(none, -h), none.float()


def _range(values: Sequence[Tensor], share: float, fixed_min: bool, symmetric: bool) -> tuple[Tensor, Tensor]:
    upper, lower = ends(values, share, share)
    if symmetric:
        upper = torch.maximum(upper, -lower)
        return upper, -upper
    return (upper, torch.zeros_like(lower)) if fixed_min else (upper, lower)
