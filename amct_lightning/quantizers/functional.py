"""The formulas of AMCT for scales, offsets, integers and what they stand for; every formula stands once.

Their gradients are in ``functions/``. (``ifmr.py`` rounds in the order of
AMCT's search, which is another one.) ``b`` is the number of bits and ``h = 2^(b-1)``; integers run from ``-h`` to
``h-1``; rounding is IEEE half-to-even. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1.192092896e-7
"""Smallest usable scale or range: the float32 machine epsilon."""


_SMALLEST_TOKEN_SCALE = 2.0**-126
"""The smallest normal float32 number: those below are too coarse to divide by, and some devices take them for 0."""


KEPT_BITS = -0x2000
"""0xFFFFE000 as an int32: sign, exponent and the 10 highest bits of the mantissa, the 19 that the hardware keeps."""


def half_range(num_bits: int) -> int:
    """Return ``h = 2^(b-1)``, so that the integers of ``b`` bits are ``-h .. h-1``.

    Example:
        >>> half_range(8)
        128
    """
    return 1 << (num_bits - 1)


def quantize(values: Tensor, scale: Tensor, num_bits: int, offset: Tensor | None = None) -> Tensor:
    """Return the integers ``clamp(round(x/s + o), -h, h-1)``, in a floating dtype.

    Args:
        values: Values ``x``.
        scale: Scale ``s``, broadcast over them.
        num_bits: Number of bits ``b``.
        offset: Offset ``o``; ``None`` for 0.

    Example:
        >>> quantize(torch.tensor([0.26, -9.0]), torch.tensor(0.5), 4)
        tensor([ 1., -8.])
    """
    h = half_range(num_bits)
    codes = torch.div(values, scale)
    if offset is not None:
        codes.add_(offset)
    return codes.round_().clamp_(-h, h - 1)


def token_scale(x: Tensor, num_bits: int) -> Tensor:
    """Return the scale of each token, ``max|x| / (h-1)`` over the last axis, which is kept.

    It is 1 for a token of zeros, or of values below 1e-36 (INT8), whose scale would be no normal float32 number.

    Args:
        x: Activations of any floating dtype, tokens along the last axis.
        num_bits: Number of bits ``b``.

    Returns:
        The scales, float32.

    Example:
        >>> token_scale(torch.tensor([[-1.27, 0.5], [0.0, 0.0]]), 8)
        tensor([[0.0100],
                [1.0000]])
    """
    scale = x.abs().amax(-1, keepdim=True).float() / (half_range(num_bits) - 1)
    return scale.masked_fill(scale < _SMALLEST_TOKEN_SCALE, 1.0)


def quantize_tokens(x: Tensor, num_bits: int) -> Tensor:
    """Return ``clamp(round(x/s), -h, h-1) * s`` with the scale of each token, in the dtype of ``x``.

    Args:
        x: Activations of any floating dtype, tokens along the last axis.
        num_bits: Number of bits ``b``.

    Example:
        >>> quantize_tokens(torch.tensor([1.27, 0.014]), 8)
        tensor([1.2700, 0.0100])
    """
    if x.shape[-1] == 0:
        return x.clone()
    scale = token_scale(x, num_bits)
    return dequantize_(quantize(x.float(), scale, num_bits), scale).to(x.dtype)


def device_codes(
    values: Tensor, scale: Tensor, num_bits: int, offset: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``clamp(round(x * (1/s)) + o, -h, h-1) - o``: the device multiplies by the reciprocal.

    Args:
        values: Values ``x``, float32.
        scale: Scale ``s``, 0-d.
        num_bits: Number of bits ``b``.
        offset: Offset ``o``, 0-d.
        dtype: Dtype that values and reciprocal are rounded to first, in which a server has them; their product is exact
            in float32. ``None`` for float32.

    Example:
        >>> device_codes(torch.tensor([0.014, 9.0]), torch.tensor(0.01), 8, torch.tensor(-128.0))
        tensor([  1., 255.])
    """
    h = half_range(num_bits)
    reciprocal = torch.reciprocal(scale)
    if dtype is not None:
        values, reciprocal = values.to(dtype).float(), reciprocal.to(dtype).float()
    return torch.mul(values, reciprocal).round_().add_(offset).clamp_(-h, h - 1).sub_(offset)


def dequantize_(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Turn what :func:`quantize` gave into ``(q - o) * s``, in place."""
    return (codes if offset is None else codes.sub_(offset)).mul_(scale)


def range_ends(scale: Tensor, num_bits: int, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest value that the integers express, ``(h-1 - o) * s`` and ``(-h - o) * s``.

    Example:
        >>> range_ends(torch.tensor(0.01), 8)
        (tensor(1.2700), tensor(-1.2800))
    """
    h = half_range(num_bits)
    return (scale * (h - 1), scale * -h) if offset is None else (scale * ((h - 1) - offset), scale * (-h - offset))


def usable_scale(scale: Tensor) -> Tensor:
    """Replace scales below :data:`EPS` by 1."""
    return scale.masked_fill(scale < EPS, 1.0)


def repair_clips(
    clip_max: Tensor, clip_min: Tensor, previous_max: Tensor, previous_min: Tensor, fixed_min: bool
) -> tuple[Tensor, Tensor]:
    """Replace clip values that learning made unusable by the previous usable ones.

    A range narrower than :data:`EPS` is replaced as a whole; a negative upper or a positive lower clip on its
    own. AMCT replaces only ranges of exactly zero width and at most one side.

    Args:
        clip_max: Upper clip, 0-d float32.
        clip_min: Lower clip, 0-d float32.
        previous_max: Upper clip of the previous step, 0-d float32.
        previous_min: Lower clip of the previous step, 0-d float32.
        fixed_min: Whether the lower clip is fixed to 0 (the input is never negative).

    Returns:
        The usable upper and lower clip.

    Example:
        >>> tensors = [torch.tensor(v) for v in (-0.5, -1.0, 2.0, -2.0)]
        >>> repair_clips(*tensors, fixed_min=False)
        (tensor(2.), tensor(-1.))
    """
    if fixed_min:
        clip_min = torch.zeros_like(clip_min)
    narrow = (clip_max - clip_min).abs() < EPS
    upper = torch.where(narrow | (clip_max < 0), previous_max, clip_max)
    lower = torch.where(narrow | (clip_min > 0), previous_min, clip_min)
    return upper, lower


def scale_in(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest scale that a dtype holds, as it does the reciprocal: neither of them is 0 or infinite.

    Args:
        scale: Scales, float32 of any shape, at least :data:`EPS`.
        dtype: bfloat16 or float16; the latter has nothing above 65504, and no reciprocal of less than 1.53e-5.

    Example:
        >>> scale_in(torch.tensor([0.1, 1e-6]), torch.float16)
        tensor([9.9976e-02, 1.5318e-05])
    """
    lowest, highest = _SCALES_IN[dtype]
    return scale.clamp(lowest, highest).to(dtype).float()


_SCALES_IN = {torch.float16: (2.0**-16 + 2.0**-24, 65504.0), torch.bfloat16: (EPS, 2.0**126)}


def range_around_zero(clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return the symmetric range that is as wide as one between two clips: its offset is 0.

    ``s = (M - m) / (2^b - 1)``, AMCT's scale; the range is ``(h-1) s .. -h s``. A scale below :data:`EPS` is 1.

    Args:
        clip_max: Upper clip ``M``, float32 of any shape, not below the lower one.
        clip_min: Lower clip ``m``, same shape.
        num_bits: 4, 8 or 16.

    Returns:
        The upper and the lower end.

    Example:
        >>> range_around_zero(torch.tensor(2.55), torch.tensor(-2.55), 8)
        (tensor(2.5400), tensor(-2.5600))
    """
    h = half_range(num_bits)
    scale = (clip_max - clip_min) / (2 * h - 1)
    # Above the limit by more than the ends are rounded, so that they give that scale and the offset 0 again.
    scale = scale.masked_fill(scale < EPS * (1 + 1e-6), 1.0)
    return scale * (h - 1), scale * -h


def activation_scale_offset(
    clip_max: Tensor, clip_min: Tensor, num_bits: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Map a clip range to the scale and offset (zero point) of asymmetric quantization.

    ``s = (max(M,0) - min(m,0)) / (2^b - 1)`` and ``o = round(-h - min(m,0)/s)``; a scale below :data:`EPS`
    becomes 1 with offset ``-h``.

    Args:
        clip_max: Upper clip ``M``, float32 of any shape.
        clip_min: Lower clip ``m``, same shape.
        num_bits: 4, 8 or 16.
        dtype: Dtype whose numbers the scale is rounded to, see :func:`scale_in`; ``None`` for float32.

    Returns:
        Scale and offset, float32, same shape; the offset holds an integer.

    Example:
        >>> activation_scale_offset(torch.tensor(2.55), torch.tensor(0.0), 8)
        (tensor(0.0100), tensor(-128.))
    """
    lower = clip_min.clamp(max=0)
    scale = (clip_max.clamp(min=0) - lower) / (2**num_bits - 1)
    h, used = half_range(num_bits), scale if dtype is None else scale_in(scale, dtype)
    offset = torch.round(-h - lower / used)
    if dtype is None:
        return guard_scale(scale, offset, num_bits)
    tiny = scale < EPS  # as it is before it is rounded
    return used.masked_fill(tiny, 1.0), offset.clamp(-h, h - 1).masked_fill(tiny, float(-h))


def guard_scale(scale: Tensor, offset: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Replace scales below :data:`EPS` by 1, and their offsets by ``-h``.

    Args:
        scale: Scales, float32 of any shape.
        offset: Offsets, same shape.
        num_bits: Number of bits ``b``.

    Returns:
        Guarded scale and offset.

    Example:
        >>> guard_scale(torch.tensor([0.5, 0.0]), torch.tensor([3.0, 3.0]), 8)
        (tensor([0.5000, 1.0000]), tensor([   3., -128.]))
    """
    tiny = scale < EPS
    return scale.masked_fill(tiny, 1.0), offset.masked_fill(tiny, float(-half_range(num_bits)))


def rounding_error(codes: Tensor, num_bits: int) -> Tensor:
    """Return ``round(z) - z`` of codes that are not rounded yet, without their offset; large ones give 0.

    Args:
        codes: ``z = x / s``, of any size.
        num_bits: Number of bits.

    Example:
        >>> rounding_error(torch.tensor([1.25, -3e38]), 8)
        tensor([-0.2500,  0.0000])
    """
    # No value of a range is as far from 0 as this bound; infinity less infinity would not be 0.
    bound = min(float(1 << (num_bits + 1)), torch.finfo(codes.dtype).max)
    codes = codes.clamp_(-bound, bound)
    return torch.round(codes).sub_(codes)


@torch.no_grad()
def kept_bits(scale: Tensor) -> Tensor:
    """Return what the hardware keeps of a dequantization scale: the top 19 bits of the float32 number.

    Args:
        scale: The scale, float32.

    Example:
        >>> kept_bits(torch.tensor(0.03)).item()
        0.029998779296875
    """
    return (scale.view(torch.int32) & KEPT_BITS).view(torch.float32)
