"""The fake-quantize formulas of AMCT as pure functions with their gradients.

Every formula stands here once. ``b`` is the number of bits and ``h = 2^(b-1)``; integers run from ``-h`` to
``h-1``; rounding is IEEE half-to-even. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1.192092896e-7
"""Smallest usable scale or range: the float32 machine epsilon."""


def half_range(num_bits: int) -> int:
    """Return ``h = 2^(b-1)``, so that the integers of ``b`` bits are ``-h .. h-1``.

    Example:
        >>> half_range(8)
        128
    """
    return 1 << (num_bits - 1)


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
    return torch.where(tiny, 1.0, scale), torch.where(tiny, float(-half_range(num_bits)), offset)


def fake_quantize_activation(
    x: Tensor, clip_max: Tensor, clip_min: Tensor, upper: Tensor, lower: Tensor, num_bits: int
) -> Tensor:
    """Quantize and dequantize ``x``, with learned-clip (ULQ) gradients.

    ``y = (clamp(round(x/s + o), -h, h-1) - o) * s`` with scale and offset of the range ``[lower, upper]``. The
    arithmetic runs in the dtype of ``x``.

    Args:
        x: Activations of any shape.
        clip_max: Parameter that receives the gradient of the upper clip, 0-d float32.
        clip_min: Parameter that receives the gradient of the lower clip, 0-d float32.
        upper: The upper clip to use, that is ``clip_max`` after :func:`repair_clips`.
        lower: The lower clip to use.
        num_bits: 4, 8 or 16.

    Returns:
        The fake-quantized activations, shape and dtype of ``x``.

    Example:
        >>> high, low = torch.tensor(2.55), torch.tensor(0.0)
        >>> fake_quantize_activation(torch.tensor([0.014, 9.0]), high, low, high, low, 8)
        tensor([0.0100, 2.5500])
    """
    y: Tensor = _FakeQuantizeActivation.apply(x, clip_max, clip_min, upper, lower, num_bits)  # type: ignore[no-untyped-call]
    return y


class _FakeQuantizeActivation(torch.autograd.Function):
    """Keeps only ``x`` and the clips for backward; everything else is cheap to rebuild."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _max: Tensor, _min: Tensor, upper: Tensor, lower: Tensor, num_bits: int) -> Tensor:
        ctx.save_for_backward(x, upper, lower)
        ctx.num_bits = num_bits
        h = half_range(num_bits)
        scale, offset = activation_scale_offset(upper, lower, num_bits)
        return torch.div(x, scale).add_(offset).round_().clamp_(-h, h - 1).sub_(offset).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, upper, lower = ctx.saved_tensors
        h = half_range(ctx.num_bits)
        scale, offset = activation_scale_offset(upper, lower, ctx.num_bits)
        above = x > scale * ((h - 1) - offset)
        below = x < scale * (-h - offset)
        codes = torch.where(above, upper, torch.where(below, lower, x)) / scale
        error = (torch.round(codes) - codes) / (2**ctx.num_bits - 1)
        grad_x = torch.where(above | below, 0.0, grad) if ctx.needs_input_grad[0] else None
        grad_max = ((error + above) * grad).sum().to(upper.dtype)
        grad_min = ((below.to(error.dtype) - error) * grad).sum().to(lower.dtype)
        return grad_x, grad_max, grad_min, None, None, None


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight are.

    Attributes:
        transposed: Whether the weight is stored input channel first, as transposed convolutions do. Output
            channel ``g * (cout/groups) + j`` is then ``weight[g*cin/groups:(g+1)*cin/groups, j]``.
        groups: Number of groups of the convolution.
    """

    transposed: bool = False
    groups: int = 1

    def view(self, weight: Tensor) -> Tensor:
        """Return a view of ``weight`` in which every axis is either all channel or all reduced."""
        return weight.unflatten(0, (self.groups, -1)) if self.transposed else weight

    def reduced_dims(self, view: Tensor, channel_wise: bool) -> tuple[int, ...]:
        """Return the axes of :meth:`view` over which one scale is shared."""
        if not channel_wise:
            return tuple(range(view.dim()))
        channel_dims = (0, 2) if self.transposed else (0,)
        return tuple(dim for dim in range(view.dim()) if dim not in channel_dims)

    def spread(self, scale: Tensor, view: Tensor, channel_wise: bool) -> Tensor:
        """Shape a 1-d ``scale`` so that it broadcasts over :meth:`view`."""
        reduced = self.reduced_dims(view, channel_wise)
        return scale.view([1 if dim in reduced else length for dim, length in enumerate(view.shape)])


def arq_scale(weight: Tensor, layout: ChannelLayout, num_bits: int, channel_wise: bool) -> Tensor:
    """Return the max-abs (ARQ) scale of a weight, shaped to broadcast over ``layout.view(weight)``.

    ``s = max|w| / (h-1)``, or ``/ h`` where the minimum has the larger magnitude; below :data:`EPS` it is 1.

    Args:
        weight: Weight, float32.
        layout: Where its output channels are.
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.

    Returns:
        Scale, float32.

    Example:
        >>> arq_scale(torch.tensor([[1.27, -0.5], [-1.28, 0.5]]), ChannelLayout(), 8, True).flatten()
        tensor([0.0100, 0.0100])
    """
    view = layout.view(weight)
    dims = layout.reduced_dims(view, channel_wise)
    high, low = view.amax(dims, keepdim=True).abs(), view.amin(dims, keepdim=True).abs()
    scale = torch.maximum(high, low) / (half_range(num_bits) - 1 + (high < low).to(weight.dtype))
    return torch.where(scale < EPS, 1.0, scale)


def fake_quantize_weight(weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int) -> Tensor:
    """Quantize and dequantize a weight symmetrically; the gradient passes straight through.

    ``y = clamp(round(w/s), -h, h-1) * s``.

    Args:
        weight: Weight, float32.
        scale: Scale as :func:`arq_scale` returns it.
        layout: Where the output channels are.
        num_bits: 4 or 8.

    Returns:
        The fake-quantized weight, shape and dtype of ``weight``.

    Example:
        >>> fake_quantize_weight(torch.tensor([[0.26, -9.0]]), torch.tensor([[0.5]]), ChannelLayout(), 4)
        tensor([[ 0.5000, -4.0000]])
    """
    y: Tensor = _FakeQuantizeWeight.apply(weight, scale, layout, num_bits)  # type: ignore[no-untyped-call]
    return y


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int) -> Tensor:
        h = half_range(num_bits)
        view = layout.view(weight)
        return torch.div(view, scale).round_().clamp_(-h, h - 1).mul_(scale).view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


def scale_gradient_factor(elements: int, num_bits: int) -> float:
    """Return ``1 / sqrt(N * (h-1))`` in float32 arithmetic, by which the gradient of a scale is normalized.

    Args:
        elements: ``N``, the number of weight elements that share the scale.
        num_bits: Number of bits ``b``.

    Example:
        >>> scale_gradient_factor(7, 4)
        0.1428571492433548
    """
    # torch's own arithmetic, not Python's: both round, and the last bit of AMCT's factor is torch's.
    squared = torch.tensor(float(elements * (half_range(num_bits) - 1)), dtype=torch.float32, device="cpu")
    return (1 / squared.sqrt()).item()


def fake_quantize_weight_learned(
    weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int, factor: float
) -> Tensor:
    """Quantize and dequantize a weight with a learned (ULQ) scale.

    The values are those of :func:`fake_quantize_weight`; the weight's gradient passes straight through, also where
    it saturates. With ``z = w/s`` the gradient of the scale is ``sum(factor * d * g)`` where ``d`` is ``h-1`` above
    the range, ``-h`` below it and ``round(z) - z`` within.

    Args:
        weight: Weight, float32.
        scale: Learned scale, float32, shaped to broadcast over ``layout.view(weight)``; used as it is, whatever
            its sign or size.
        layout: Where the output channels are.
        num_bits: 4 or 8.
        factor: What :func:`scale_gradient_factor` gives.

    Returns:
        The fake-quantized weight, shape and dtype of ``weight``.

    Example:
        >>> scale = torch.tensor([[0.5]], requires_grad=True)
        >>> y = fake_quantize_weight_learned(torch.tensor([[0.26, 9.0]]), scale, ChannelLayout(), 4, factor=0.25)
        >>> y.sum().backward()
        >>> y.detach(), scale.grad
        (tensor([[0.5000, 3.5000]]), tensor([[1.8700]]))
    """
    y: Tensor = _FakeQuantizeWeightLearned.apply(weight, scale, layout, num_bits, factor)  # type: ignore[no-untyped-call]
    return y


class _FakeQuantizeWeightLearned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int, factor: float) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.settings = layout, half_range(num_bits), factor
        return _FakeQuantizeWeight.forward(ctx, weight, scale, layout, num_bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        layout, h, factor = ctx.settings
        view = layout.view(weight)
        codes = view / scale
        above = (view > scale * (h - 1)).to(view.dtype)
        below = (view < scale * -h).to(view.dtype)
        # With a negative scale a value is above and below at once; AMCT's sum of the three terms is kept for it.
        step = above * (h - 1) - below * h + (1 - above - below) * (torch.round(codes) - codes)
        terms = step * factor * layout.view(grad)
        grad_scale = terms.sum().view(scale.shape) if scale.numel() == 1 else terms.sum_to_size(scale.shape)
        return grad, grad_scale, None, None, None
