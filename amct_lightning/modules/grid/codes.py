"""The codes that the device computes with, with the gradients of the fake-quantized values that they stand for.

A code ``c`` stands for ``c * s``. Its gradient is turned into that of ``c * s``, and from there all is as without the
device's grid: straight through the rounding, with the learned clips and scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers import ActivationQuantizer, ChannelLayout, LearnedWeightQuantizer, WeightQuantizer
from amct_lightning.quantizers.executors import Factors
from amct_lightning.quantizers.functional import device_codes, quantize, usable_scale
from amct_lightning.quantizers.functions.activation import activation_gradients, activation_tangent
from amct_lightning.quantizers.functions.weight import gradient_of_scale, slope_of_scale
from amct_lightning.quantizers.transforms import call, differentiable_once, direct_form, transforming


class Codes(NamedTuple):
    """Integers and what they are multiplied by.

    Attributes:
        values: The integers, less their offset, float32; with a gradient.
        scale: The scale, float32: 0-d of activations, 1-d of weights, where it is a single one or one per channel.
        num_bits: Number of bits.
        dtype: Dtype that a server computes with, of activations; ``None`` for the device of a compiled network.
    """

    values: Tensor
    scale: Tensor
    num_bits: int
    dtype: torch.dtype | None = None


def activation_codes(quantizer: ActivationQuantizer, x: Tensor, upper: Tensor, lower: Tensor) -> Codes:
    """Return ``clamp(round(x * (1/s)) + o, -h, h-1) - o``: the device multiplies by the float32 reciprocal.

    Args:
        quantizer: The quantizer.
        x: Activations of any shape and floating dtype.
        upper: Upper clip, as ``quantizer.update_range`` gives it.
        lower: Lower clip.

    Example:
        >>> quantizer = ActivationQuantizer(num_bits=8, clip=(2.55, -1e-9), fixed_min=True)
        >>> activation_codes(quantizer, torch.tensor([0.014, 9.0]), *quantizer.usable_clips()).values.detach()
        tensor([  1., 255.])
    """
    with torch.no_grad():
        scale, offset = quantizer.factors_of(upper, lower)
    return input_codes(quantizer, x, Factors(upper, lower, scale, offset, quantizer.num_bits, dtype=quantizer.serving))


def input_codes(quantizer: ActivationQuantizer, x: Tensor, factors: Factors) -> Codes:
    """Return the same as :func:`activation_codes`, from the factors.

    Args:
        quantizer: The quantizer.
        x: Activations of any shape and floating dtype.
        factors: What they are quantized with.
    """
    upper, lower, scale, offset, num_bits = factors[:5]
    clips, settings = (*quantizer.learned_clips, upper, lower), (num_bits, torch.float32, factors.dtype)
    codes = call(_ActivationCodes, _DIRECT, x, *clips, scale, offset, settings)
    return Codes(codes, scale, num_bits, factors.dtype)


def weight_codes(quantizer: WeightQuantizer, weight: Tensor) -> Codes:
    """Return ``clamp(round(w / s), -h, h-1)``, as a forward of the quantizer in training would.

    Args:
        quantizer: The quantizer of the weight; it keeps its books.
        weight: The weight.

    Example:
        >>> weight = torch.tensor([[1.27, 0.014]])
        >>> weight_codes(WeightQuantizer(8, False, ChannelLayout(), weight), weight).values
        tensor([[127.,   1.]])
    """
    values, layout, num_bits = weight.float(), quantizer.layout, quantizer.num_bits
    scale = quantizer.present_scale(values)
    with torch.no_grad():
        used = usable_scale(scale)  # a learned scale that the hardware cannot use is 1 in the record
    if isinstance(quantizer, LearnedWeightQuantizer):
        settings = layout, num_bits, quantizer.gradient_factor
        codes = call(_LearnedWeightCodes, _DIRECT_LEARNED, values, scale, used, settings)
    else:
        codes = call(_WeightCodes, _DIRECT_WEIGHT, values, used, layout, num_bits)
    return Codes(codes, used.flatten(), num_bits)


class _ActivationCodes(torch.autograd.Function):
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
        settings: tuple[int, torch.dtype, torch.dtype | None],
    ) -> Tensor:
        num_bits, dtype, served_in = settings
        return device_codes(x.to(dtype), scale, num_bits, offset, served_in)

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
        saved = ctx.saved_tensors
        gradients = activation_gradients(saved, ctx.settings[:2], ctx.needs_input_grad[:3], grad / saved[3])
        return (*gradients, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, clip_max: Tensor | None, clip_min: Tensor | None, *_: Any) -> Tensor:
        saved = ctx.saved_tensors
        scale: Tensor = saved[3]
        return activation_tangent(saved, ctx.settings[:2], (x, clip_max, clip_min)) / scale


_DIRECT = direct_form(_ActivationCodes)


class _WeightCodes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, layout: ChannelLayout, num_bits: int) -> Tensor:
        return quantize(layout.view(weight), scale, num_bits).view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, scale, ctx.layout, _ = inputs
        ctx.save_for_backward(scale)
        if transforming():
            ctx.save_for_forward(scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _divided(grad, ctx.saved_tensors[0], ctx.layout), None, None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, *_: Any) -> Tensor:
        return _divided(weight, ctx.saved_tensors[0], ctx.layout)


_DIRECT_WEIGHT = direct_form(_WeightCodes)


class _LearnedWeightCodes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, _scale: Tensor, used: Tensor, settings: tuple[ChannelLayout, int, float]) -> Tensor:
        return _WeightCodes.forward(weight, used, settings[0], settings[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors)
        if transforming():
            ctx.save_for_forward(*tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, used = ctx.saved_tensors
        of_values = _divided(grad, used, ctx.settings[0])
        of_scale = gradient_of_scale(tuple(saved), ctx.settings, of_values) if ctx.needs_input_grad[1] else None
        return of_values, of_scale, None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor | None, scale: Tensor | None, *_: Any) -> Tensor:
        *saved, used = ctx.saved_tensors
        tangent = torch.zeros_like(saved[0]) if weight is None else weight
        if scale is not None:
            tangent = tangent + (slope_of_scale(tuple(saved), ctx.settings) * scale).view_as(saved[0])
        return _divided(tangent, used, ctx.settings[0])


_DIRECT_LEARNED = direct_form(_LearnedWeightCodes)


def _divided(values: Tensor, scale: Tensor, layout: ChannelLayout) -> Tensor:
    return (layout.view(values) / scale).view_as(values)
