"""The formulas of AMCT that all quantization has in common, and those for activations with their gradients.

What only weights need is in ``weight_functional.py``; every formula stands once. (``ifmr.py`` rounds in the order of
AMCT's search, which is another one.) ``b`` is the number of bits and ``h = 2^(b-1)``; integers run from ``-h`` to
``h-1``; rounding is IEEE half-to-even. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amct_lightning.quantizers.transforms import call, differentiable_once, direct_form, times_, transforming

EPS = 1.192092896e-7
"""Smallest usable scale or range: the float32 machine epsilon."""


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


def activation_scale_offset(clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Map a clip range to the scale and offset (zero point) of asymmetric quantization.

    ``s = (max(M,0) - min(m,0)) / (2^b - 1)`` and ``o = round(-h - min(m,0)/s)``; a scale below :data:`EPS`
    becomes 1 with offset ``-h``.

    Args:
        clip_max: Upper clip ``M``, float32 of any shape.
        clip_min: Lower clip ``m``, same shape.
        num_bits: 4, 8 or 16.

    Returns:
        Scale and offset, float32, same shape; the offset holds an integer.

    Example:
        >>> activation_scale_offset(torch.tensor(2.55), torch.tensor(0.0), 8)
        (tensor(0.0100), tensor(-128.))
    """
    lower = clip_min.clamp(max=0)
    scale = (clip_max.clamp(min=0) - lower) / (2**num_bits - 1)
    return guard_scale(scale, torch.round(-half_range(num_bits) - lower / scale), num_bits)


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


def fake_quantize_activation(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    upper: Tensor,
    lower: Tensor,
    num_bits: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize and dequantize ``x``, with learned-clip (ULQ) gradients.

    ``y = (clamp(round(x/s + o), -h, h-1) - o) * s`` with scale and offset of the range ``[lower, upper]``.

    Args:
        x: Activations of any shape.
        clip_max: Parameter that receives the gradient of the upper clip, 0-d float32.
        clip_min: Parameter that receives the gradient of the lower clip, 0-d float32.
        upper: The upper clip to use, that is ``clip_max`` after :func:`repair_clips`.
        lower: The lower clip to use.
        num_bits: 4, 8 or 16.
        dtype: Dtype of the arithmetic, there and back; ``None`` for that of ``x``. What is kept for backward is
            ``x`` itself in any case.

    Returns:
        The fake-quantized activations, shape and dtype of ``x``.

    Example:
        >>> high, low = torch.tensor(2.55), torch.tensor(0.0)
        >>> fake_quantize_activation(torch.tensor([0.014, 9.0]), high, low, high, low, 8)
        tensor([0.0100, 2.5500])
    """
    with torch.no_grad():
        scale, offset = activation_scale_offset(upper, lower, num_bits)
    settings = num_bits, dtype or x.dtype
    return call(_FakeQuantizeActivation, _DIRECT, x, clip_max, clip_min, upper, lower, scale, offset, settings)


class _FakeQuantizeActivation(torch.autograd.Function):
    """Keeps only ``x`` and single numbers for backward; everything else is cheap to rebuild."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        _max: Tensor,
        _min: Tensor,
        _upper: Tensor,
        _lower: Tensor,
        scale: Tensor,
        offset: Tensor,
        settings: tuple[int, torch.dtype],
    ) -> Tensor:
        num_bits, dtype = settings
        return dequantize_(quantize(x.to(dtype), scale, num_bits, offset), scale, offset).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, *numbers, ctx.settings = inputs
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(x, *numbers)
        if transforming():
            ctx.save_for_forward(x, *numbers)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = activation_gradients(ctx.saved_tensors, ctx.settings, ctx.needs_input_grad[:3], grad)
        return (*gradients, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, clip_max: Tensor | None, clip_min: Tensor | None, *_: Any) -> Tensor:
        saved = ctx.saved_tensors
        return activation_tangent(saved, ctx.settings, (x, clip_max, clip_min)).to(saved[0].dtype)


_DIRECT = direct_form(_FakeQuantizeActivation)


def activation_gradients(
    saved: tuple[Tensor, ...], settings: tuple[int, torch.dtype], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the input and of both clips from that of the fake-quantized activations.

    Args:
        saved: The activations, upper and lower clip, scale and offset.
        settings: Number of bits, and dtype of the arithmetic.
        needs: Which of the three are wanted; the others are ``None``.
        grad: The gradient.
    """
    (x, upper, lower), dtype = saved[:3], settings[1]
    grad_x, grad_max, grad_min = None, None, None
    cast = grad.to(dtype)
    above, below, error = _slopes(saved, settings, clips=needs[1] or needs[2])
    if needs[0]:
        grad_x = torch.where(above | below, 0.0, cast).to(x.dtype)
    if needs[1]:
        grad_max = times_(error + above, cast).sum().to(upper.dtype)
    if needs[2]:
        grad_min = times_(below.to(error.dtype).sub_(error), cast).sum().to(lower.dtype)
    return grad_x, grad_max, grad_min


def activation_tangent(
    saved: tuple[Tensor, ...], settings: tuple[int, torch.dtype], tangents: Sequence[Tensor | None]
) -> Tensor:
    """Return the tangent of the fake-quantized activations, in the dtype of the arithmetic.

    Args:
        saved: The activations, upper and lower clip, scale and offset.
        settings: Number of bits, and dtype of the arithmetic.
        tangents: Those of the input, the upper and the lower clip.
    """
    x, clip_max, clip_min = tangents
    above, below, error = _slopes(saved, settings, clips=True)
    tangent = torch.zeros_like(error) if x is None else torch.where(above | below, 0.0, x.to(error.dtype))
    if clip_max is not None:
        tangent = tangent + (error + above) * clip_max
    if clip_min is not None:
        tangent = tangent + (below.to(error.dtype) - error) * clip_min
    return tangent


def _slopes(saved: tuple[Tensor, ...], settings: tuple[int, torch.dtype], clips: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return where ``x`` is above and below the range, and the part of the gradients of the clips that they share."""
    (x, upper, lower, scale, offset), (num_bits, dtype) = saved, settings
    x = x.to(dtype)
    largest, smallest = range_ends(scale, num_bits, offset)
    above, below = x > largest, x < smallest
    if not clips:
        return above, below, x
    codes = torch.where(above, upper, torch.where(below, lower, x)).div_(scale)
    return above, below, torch.round(codes).sub_(codes).div_(2**num_bits - 1)
