"""The fake quantization of activations with its gradients: AMCT's learned clips (ULQ), as pure functions.

``b`` is the number of bits and ``h = 2^(b-1)``; integers run from ``-h`` to ``h-1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import (
    activation_scale_offset,
    dequantize_,
    half_range,
    quantize,
    quantize_tokens,
    range_around_zero,
    range_ends,
    rounding_error,
)
from amct_lightning.quantizers.transforms import call, differentiable_once, direct_form, times_, transforming


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


def clips_around_zero(clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return :func:`range_around_zero` of two clips, with its gradient, for which nothing is kept.

    ``dL/dM = ((h-1) dL/du - h dL/dl) / (2^b - 1)`` from those of the upper end ``u`` and the lower end ``l``, and
    ``dL/dm = -dL/dM``: the clips move by the same amount and in opposite directions, so they are one magnitude.

    Args:
        clip_max: Upper clip ``M``, 0-d float32.
        clip_min: Lower clip ``m``.
        num_bits: 4, 8 or 16.

    Example:
        >>> high, low = torch.tensor(2.55, requires_grad=True), torch.tensor(-2.55, requires_grad=True)
        >>> clips_around_zero(high, low, 8)[0].backward()
        >>> (high.grad * 255).round(), (low.grad * 255).round()
        (tensor(127.), tensor(-127.))
    """
    upper, lower = (_AroundZero if transforming() else _DIRECT_AROUND_ZERO).apply(clip_max, clip_min, num_bits)
    return upper, lower


class _AroundZero(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        return range_around_zero(clip_max, clip_min, num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.h = half_range(inputs[2])

    @staticmethod
    def backward(ctx: Any, of_upper: Tensor, of_lower: Tensor) -> tuple[Tensor, Tensor, None]:
        of_max = (of_upper * (ctx.h - 1) - of_lower * ctx.h) / (2 * ctx.h - 1)
        return of_max, -of_max, None

    @staticmethod
    def jvp(ctx: Any, of_max: Tensor | None, of_min: Tensor | None, _bits: None) -> tuple[Tensor, Tensor]:
        known = of_max if of_max is not None else of_min
        assert known is not None
        high, low = (torch.zeros_like(known) if part is None else part for part in (of_max, of_min))
        of_scale = (high - low) / (2 * ctx.h - 1)
        return of_scale * (ctx.h - 1), of_scale * -ctx.h


_DIRECT_AROUND_ZERO = direct_form(_AroundZero)


def fake_quantize_tokens(x: Tensor, num_bits: int) -> Tensor:
    """Quantize and dequantize each token with a scale of its own; the gradient passes straight through.

    ``s = max|x| / (h-1)`` over the last axis, 1 for a token of zeros; ``y = round(x/s) * s``. No value is clipped, so
    the gradient of the input is that of the output; nothing is kept for it.

    Args:
        x: Activations, tokens along the last axis.
        num_bits: 4, 8 or 16.

    Returns:
        The fake-quantized activations, shape and dtype of ``x``; the arithmetic is in float32.

    Example:
        >>> fake_quantize_tokens(torch.tensor([[1.27, 0.014], [127.0, 0.4], [0.0, 0.0]]), 8)
        tensor([[1.2700e+00, 1.0000e-02],
                [1.2700e+02, 0.0000e+00],
                [0.0000e+00, 0.0000e+00]])
    """
    # With two arguments, torch.compile would take the forward for one without a context.
    return call(_FakeQuantizeTokens, _DIRECT_TOKENS, x, num_bits, None)


class _FakeQuantizeTokens(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, num_bits: int, _unused: None) -> Tensor:
        return quantize_tokens(x, num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        return x.clone()


_DIRECT_TOKENS = direct_form(_FakeQuantizeTokens)


class Ends(NamedTuple):
    """What the gradients need of the ends of a range; float32 tensors of one shape.

    Attributes:
        largest: The largest value that the integers express.
        smallest: The smallest one.
        upper_error: By how much rounding changes the code of the upper clip.
        lower_error: The same of the lower clip.
    """

    largest: Tensor
    smallest: Tensor
    upper_error: Tensor
    lower_error: Tensor

    @classmethod
    def of(cls, upper: Tensor, lower: Tensor, scale: Tensor, offset: Tensor, num_bits: int) -> Ends:
        """Return those of a range, or of several.

        Args:
            upper: Upper clip, float32 of any shape.
            lower: Lower clip.
            scale: Scale.
            offset: Offset.
            num_bits: Number of bits.
        """
        errors = (rounding_error(end / scale, num_bits) for end in (upper, lower))
        return cls(*range_ends(scale, num_bits, offset), *errors)


def activation_gradients(
    saved: tuple[Tensor, ...],
    settings: tuple[int, torch.dtype],
    needs: Sequence[bool],
    grad: Tensor,
    ends: Ends | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the input and of both clips from that of the fake-quantized activations.

    Args:
        saved: The activations, upper and lower clip, scale and offset.
        settings: Number of bits, and dtype of the arithmetic.
        needs: Which of the three are wanted; the others are ``None``.
        grad: The gradient.
        ends: What is known of the range already.
    """
    (x, upper, lower, scale, offset), (num_bits, dtype) = saved, settings
    x, grad = x.to(dtype), grad.to(dtype)
    ends = ends or Ends.of(upper, lower, scale, offset, num_bits)
    # The gradient where x is above and below the range, 0 elsewhere, without a mask: those are slow on CPUs.
    above = torch.ops.aten.threshold_backward(grad, x - ends.largest, 0)
    below = torch.ops.aten.threshold_backward(grad, ends.smallest - x, 0)
    inside = torch.sub(grad, above).sub_(below)
    grad_x = inside.to(saved[0].dtype) if needs[0] else None
    if not (needs[1] or needs[2]):
        return grad_x, None, None
    if dtype.itemsize < scale.dtype.itemsize:  # single numbers, rounded to it, would be too coarse
        above_range, below_range, slope = _slopes(saved, settings, clips=True)
        grad_max = ((slope + above_range) * grad).sum().to(upper.dtype) if needs[1] else None
        grad_min = ((below_range.to(dtype) - slope) * grad).sum().to(lower.dtype) if needs[2] else None
        return grad_x, grad_max, grad_min
    error = rounding_error(x / scale, num_bits)
    error = times_(error, inside)
    shared, upper_sum, lower_sum = (terms.sum() for terms in (error, above, below))
    for end, part in ((ends.upper_error, upper_sum), (ends.lower_error, lower_sum)):
        shared = torch.addcmul(shared, end, part)
    shared = shared / (2**num_bits - 1)
    grad_max = (shared + upper_sum).to(upper.dtype) if needs[1] else None
    grad_min = (lower_sum - shared).to(lower.dtype) if needs[2] else None
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
