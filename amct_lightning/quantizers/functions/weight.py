"""The fake-quantize formulas of AMCT for weights, as pure functions with their gradients.

``b`` is the number of bits and ``h = 2^(b-1)``; weights are quantized symmetrically, their offset is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import dequantize_, half_range, quantize, range_ends, usable_scale
from amct_lightning.quantizers.transforms import call, differentiable_once, direct_form, transforming


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels of a weight are.

    Attributes:
        transposed: Whether the weight is stored input channel first, as transposed convolutions do. Output
            channel ``g * (cout/groups) + j`` is then ``weight[g*cin/groups:(g+1)*cin/groups, j]``.
        groups: Number of groups of the convolution.
        group_size: How many inputs of an output channel of a matrix share a scale; 0 for all. What is said of output
            channels is then said of these groups.
    """

    transposed: bool = False
    groups: int = 1
    group_size: int = 0

    def view(self, weight: Tensor) -> Tensor:
        """Return a view of ``weight`` in which every axis is either all channel or all reduced."""
        if self.group_size:
            grouped: Tensor = weight.unflatten(1, (-1, self.group_size))
            return grouped
        return weight.unflatten(0, (self.groups, -1)) if self.transposed else weight

    def reduced_dims(self, view: Tensor, channel_wise: bool) -> tuple[int, ...]:
        """Return the axes of :meth:`view` over which one scale is shared."""
        if not channel_wise:
            return tuple(range(view.dim()))
        channel_dims = (0, 2) if self.transposed else (0, 1) if self.group_size else (0,)
        return tuple(dim for dim in range(view.dim()) if dim not in channel_dims)

    def spread(self, scale: Tensor, view: Tensor, channel_wise: bool) -> Tensor:
        """Shape a 1-d ``scale`` so that it broadcasts over :meth:`view`."""
        reduced = self.reduced_dims(view, channel_wise)
        return scale.view([1 if dim in reduced else length for dim, length in enumerate(view.shape)])


def symmetric_divisor(high: Tensor, low: Tensor, num_bits: int) -> Tensor:
    """Return by what the larger of two magnitudes is divided for a symmetric scale: ``h-1``, for the lower one ``h``.

    Args:
        high: Magnitude of the upper end.
        low: Magnitude of the lower end, same dtype.
        num_bits: Number of bits ``b``.
    """
    return half_range(num_bits) - 1 + (high < low).to(high.dtype)


def arq_scale(weight: Tensor, layout: ChannelLayout, num_bits: int, channel_wise: bool) -> Tensor:
    """Return the max-abs (ARQ) scale of a weight, shaped to broadcast over ``layout.view(weight)``.

    ``s = max|w| / (h-1)``, or ``/ h`` where the minimum has the larger magnitude; below ``EPS`` it is 1.

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
    return usable_scale(torch.maximum(high, low) / symmetric_divisor(high, low, num_bits))


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
    return call(_FakeQuantizeWeight, _DIRECT, weight, scale, layout, num_bits)


class _FakeQuantizeWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int) -> Tensor:
        return dequantize_(quantize(layout.view(weight), scale, num_bits), scale).view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    @differentiable_once
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None

    @staticmethod
    def jvp(_ctx: Any, weight: Tensor, *_: Any) -> Tensor:
        return weight.view_as(weight)


_DIRECT = direct_form(_FakeQuantizeWeight)


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
    return call(_FakeQuantizeWeightLearned, _DIRECT_LEARNED, weight, scale, layout, num_bits, factor)


class _FakeQuantizeWeightLearned(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int, _factor: float) -> Tensor:
        return _FakeQuantizeWeight.forward(weight, scale, layout, num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, scale, *ctx.settings = inputs
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(weight, scale)
        if transforming():
            ctx.save_for_forward(weight, scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_scale = None
        if ctx.needs_input_grad[1]:
            saved = ctx.saved_tensors  # read once, as activation checkpointing demands
            grad_scale = gradient_of_scale(saved, ctx.settings, grad)
        return grad, grad_scale, None, None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor | None, scale: Tensor | None, *_: Any) -> Tensor | None:
        if scale is None:
            return None if weight is None else weight.view_as(weight)
        saved = ctx.saved_tensors
        tangent = (slope_of_scale(saved, ctx.settings) * scale).view_as(saved[0])
        return tangent if weight is None else weight + tangent


_DIRECT_LEARNED = direct_form(_FakeQuantizeWeightLearned)


def gradient_of_scale(saved: tuple[Tensor, ...], settings: Sequence[Any], grad: Tensor) -> Tensor:
    """Return the gradient of a learned scale from that of the fake-quantized weight.

    Args:
        saved: The weight and the scale.
        settings: Layout, number of bits and the factor that normalizes the gradient.
        grad: The gradient.
    """
    scale, layout = saved[1], settings[0]
    terms: Tensor = slope_of_scale(saved, settings) * layout.view(grad)
    return terms.sum().view(scale.shape) if scale.numel() == 1 else terms.sum_to_size(scale.shape)


def slope_of_scale(saved: tuple[Tensor, ...], settings: Sequence[Any]) -> Tensor:
    """Return by how much the weight changes with its scale, times the factor that normalizes the gradient.

    Args:
        saved: The weight and the scale.
        settings: Layout, number of bits and the factor.
    """
    (weight, scale), (layout, num_bits, factor) = saved, settings
    view, h = layout.view(weight), half_range(num_bits)
    codes = view / scale
    largest, smallest = range_ends(scale, num_bits)
    above, below = (view > largest).to(view.dtype), (view < smallest).to(view.dtype)
    # With a negative scale a value is above and below at once. AMCT's sum of the three terms is kept for it, and its
    # order, which decides the last bit.
    step = (1 - above - below) * (torch.round(codes) - codes) - below * h + above * (h - 1)
    slope: Tensor = step * factor
    return slope
