"""The codes of inputs and weights as 8-bit integers, exactly those that fake quantization rounds to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import half_range, quantize

ToCodes = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""From values, scale, offset and number of bits to codes, as :func:`unsigned_codes`."""

PIECE = 1 << 17
"""Numbers that are quantized at a time where there are many: their float32 codes stay in the cache of a CPU."""

MANY = 4 * PIECE
"""From here on, memory for float32 codes of the whole input costs more than doing it piece by piece."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Rank -> the memory format with the channels last."""


@torch.no_grad()
def signed_codes(x: Tensor, scale: Tensor, offset: Tensor | None, num_bits: int) -> Tensor:
    """Return ``clamp(round(x/s + o), -h, h-1)`` as int8, in the memory format of ``x``.

    Args:
        x: Values of any shape and floating dtype; they are divided in float32.
        scale: Scale, broadcast over them.
        offset: Offset, 0-d; ``None`` for 0.
        num_bits: At most 8.

    Example:
        >>> signed_codes(torch.tensor([0.26, -9.0]), torch.tensor(0.5), None, 4)
        tensor([ 1, -8], dtype=torch.int8)
    """
    return quantize(x.float(), scale, num_bits, offset).to(torch.int8)


@torch.no_grad()
def unsigned_codes(x: Tensor, scale: Tensor, offset: Tensor, num_bits: int) -> Tensor:
    """Return ``clamp(round(x/s + o), -h, h-1) + h`` as uint8, in the memory format of ``x``.

    Args:
        x: Values of any shape and floating dtype; they are divided in float32.
        scale: Scale, 0-d.
        offset: Offset, 0-d.
        num_bits: At most 8.

    Example:
        >>> unsigned_codes(torch.tensor([0.0, 0.5, 9.0]), torch.tensor(0.5), torch.tensor(-8.0), 4)
        tensor([ 0,  1, 15], dtype=torch.uint8)
    """
    half = half_range(num_bits)
    if torch.compiler.is_compiling():  # one loop, which needs no detour by int8
        return (quantize(x.float(), scale, num_bits, offset) + half).to(torch.uint8)
    in_pieces = x.device.type == "cpu" and x.numel() > MANY and _is_dense(x)
    codes = (_in_pieces if in_pieces else signed_codes)(x, scale, offset, num_bits)
    return codes.view(torch.uint8).add_(half)  # wraps around, so that -h becomes 0


@torch.no_grad()
def weight_codes(weight: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Return ``clamp(round(w/s), -h, h-1)`` as int8.

    Args:
        weight: The weight, output channel first, of any floating dtype.
        scale: Its scales, 1-d: one per output channel, or a single one.
        num_bits: At most 8.

    Example:
        >>> weight_codes(torch.tensor([[1.0], [-9.0]]), torch.tensor([0.5, 1.0]), 4)
        tensor([[ 2],
                [-8]], dtype=torch.int8)
    """
    return signed_codes(weight, scale.view(-1, *[1] * (weight.dim() - 1)), None, num_bits)


def _in_pieces(x: Tensor, scale: Tensor, offset: Tensor, num_bits: int) -> Tensor:
    codes = torch.empty_like(x, dtype=torch.int8)
    flat = (x.numel(),), (1,)
    for values, target in zip(x.as_strided(*flat).split(PIECE), codes.as_strided(*flat).split(PIECE), strict=True):
        target.copy_(quantize(values.float(), scale, num_bits, offset))
    return codes


def _is_dense(x: Tensor) -> bool:
    """Tell whether a tensor fills its memory, contiguous or channels last."""
    return x.is_contiguous() or (x.dim() in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()]))
