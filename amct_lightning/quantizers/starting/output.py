"""A calibrated range with the least squared error of what layers make of the values (``init: output``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import (
    EPS,
    activation_scale_offset,
    dequantize_,
    quantize,
    range_around_zero,
)

BOTH_ENDS = tuple(0.9**step for step in range(28))
"""By what both ends of the observed range are multiplied first: 1 down to 0.06."""

ONE_END = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0)
"""By what one end of the best range so far is multiplied then, each in turn, twice."""

Product = Callable[[Tensor], Tensor]
"""What a layer makes of its input, without its bias."""


class Reader(NamedTuple):
    """A layer that reads the values.

    Attributes:
        exact: What it makes of them with its weight as it is.
        quantized: The same with its quantized weight.
    """

    exact: Product
    quantized: Product


class _Range(NamedTuple):
    num_bits: int
    fixed_min: bool
    symmetric: bool

    def values(self, x: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        if self.symmetric:
            upper, lower = range_around_zero(upper, lower, self.num_bits)
        scale, offset = activation_scale_offset(upper, lower, self.num_bits)
        return dequantize_(quantize(x, scale, self.num_bits, offset), scale, offset)


@torch.no_grad()
def output_range(
    batches: Sequence[Tensor],
    readers: Sequence[Reader],
    first: tuple[Tensor, Tensor],
    num_bits: int,
    fixed_min: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the range with which the outputs of layers have the least squared error, relative to their squares.

    First both ends of the observed range are made smaller together, then each end on its own is moved around the best,
    which is never worse than ``first``. Beside the batches there are one output and one quantized batch at a time, and
    nothing is read on the host.

    Args:
        batches: Observed activations, any shapes and floating dtype, on one device. NaN and infinity count as 0.
        readers: The layers that read them.
        first: Upper and lower clip to be compared with, 0-d.
        num_bits: 4, 8 or 16.
        fixed_min: Whether the range begins with 0.
        symmetric: Whether it is one around 0.

    Returns:
        Upper and lower clip, 0-d float32.

    Example:
        >>> x, weight = torch.tensor([[0.9, -0.2], [1.0, 0.5]]), torch.tensor([[1.0], [0.0]])
        >>> first, layer = (torch.tensor(1.0), torch.tensor(-1.0)), lambda x: x @ weight
        >>> upper, lower = output_range([x], [Reader(layer, layer)], first, 4)
        >>> bool(lower > -0.5)
        True
    """
    settings = _Range(num_bits, fixed_min, symmetric)
    batches = [batch for batch in batches if batch.numel()]
    highest = torch.stack([_finite(batch).amax() for batch in batches]).amax().clamp(min=0)
    lowest = torch.stack([_finite(batch).amin() for batch in batches]).amin().clamp(max=0)
    if symmetric:
        highest = torch.maximum(highest, -lowest)
        lowest = -highest
    lowest = torch.zeros_like(lowest) if fixed_min else lowest
    candidates = [first, *((highest * ratio, lowest * ratio) for ratio in BOTH_ENDS)]
    best = _best(batches, readers, candidates, settings)
    ends = (0,) if fixed_min or symmetric else (0, 1)
    for end in ends * 2:
        moved = [best]
        for ratio in ONE_END:
            ranges = (best[0] * ratio, best[1]) if end == 0 else (best[0], best[1] * ratio)
            moved.append((ranges[0], -ranges[0]) if symmetric else ranges)
        best = _best(batches, readers, moved, settings)
    return best


def _best(
    batches: Sequence[Tensor],
    readers: Sequence[Reader],
    candidates: Sequence[tuple[Tensor, Tensor]],
    settings: _Range,
) -> tuple[Tensor, Tensor]:
    upper, lower = (torch.stack([candidate[end].float() for candidate in candidates]) for end in (0, 1))
    losses = torch.zeros_like(upper)
    for layer in readers:
        errors, power = torch.zeros_like(upper), torch.zeros_like(upper[0])
        for batch in batches:
            x = _finite(batch)
            wanted = layer.exact(x)
            power += wanted.square().sum()
            found = [layer.quantized(settings.values(x, *ends)).sub_(wanted) for ends in _each(upper, lower)]
            errors += torch.stack([error.square_().sum() for error in found])
        losses += errors / power.clamp(min=EPS)
    losses = losses.masked_fill((upper - lower).abs() / (2**settings.num_bits - 1) < EPS, torch.inf)
    chosen = losses.nan_to_num(torch.inf, torch.inf).argmin().view(1)
    return upper.index_select(0, chosen).squeeze(0), lower.index_select(0, chosen).squeeze(0)


def _each(upper: Tensor, lower: Tensor) -> zip[tuple[Tensor, Tensor]]:
    return zip(upper.unbind(), lower.unbind(), strict=True)


def _finite(values: Tensor) -> Tensor:
    return values.detach().float().nan_to_num(0.0, 0.0, 0.0)
