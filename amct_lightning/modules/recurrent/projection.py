"""The product of the quantized input of all steps with the quantized input weight; backward rebuilds both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_lightning.modules.recurrent.factors import (
    ActivationFactors,
    WeightFactors,
    WeightSettings,
    rebuilt_weight,
    weight_gradients,
)
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.functions.activation import activation_gradients
from amct_lightning.quantizers.transforms import differentiable_once


class _Settings(NamedTuple):
    num_bits: int
    time_axis: int
    weight: WeightSettings
    recorded: bool


def project(
    x: Tensor,
    quantizer: ActivationQuantizer,
    factors: ActivationFactors,
    weight: WeightFactors,
    bias: Tensor | None,
    time_axis: int,
) -> Tensor:
    """Return the product of the fake-quantized input and weight, plus the bias; time comes first.

    Args:
        x: The input of all steps.
        quantizer: Its quantizer.
        factors: How it is quantized.
        weight: The weight.
        bias: The bias.
        time_axis: Where in the input the time is.
    """
    settings = _Settings(quantizer.num_bits, time_axis, weight.settings, torch.is_grad_enabled())
    learned = x, *quantizer.learned_clips, weight.weight, weight.scale, bias
    gates: Tensor = _Projection.apply(*learned, weight.quantized, *factors, settings)  # type: ignore[no-untyped-call]
    return gates


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _max: Tensor,
        _min: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantized_weight: Tensor,
        *rest: Any,
    ) -> Tensor:
        *numbers, settings = rest
        factors = ActivationFactors(*numbers)
        if any(ctx.needs_input_grad[:5]):
            ctx.save_for_backward(x, weight, weight_scale, *factors)
        ctx.settings, ctx.bias_dtype = settings, None if bias is None else bias.dtype
        quantized = factors.quantized(x, settings.num_bits).movedim(settings.time_axis, 0)
        if settings.recorded and any(ctx.needs_input_grad[3:5]):
            # By this torch chooses how to multiply what is not contiguous, and so the last bits.
            quantized_weight = quantized_weight.detach().requires_grad_()
        return F.linear(quantized, quantized_weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, settings = ctx.needs_input_grad, ctx.settings
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = of_max = of_min = of_weight = of_scale = None
        of_bias = flat.sum(0).to(ctx.bias_dtype) if needs[5] else None
        if any(needs[:5]):
            x, weight, scale, *numbers = ctx.saved_tensors
            factors = ActivationFactors(*numbers)
        if any(needs[3:5]):
            quantized = factors.quantized(x, settings.num_bits).movedim(settings.time_axis, 0)
            product = flat.t() @ quantized.reshape(-1, x.shape[-1]).to(grad.dtype)
            of_weight, of_scale = weight_gradients(weight, scale, settings.weight, product, needs[4])
        if any(needs[:3]):
            back = grad @ rebuilt_weight(weight, scale, settings.weight).to(grad.dtype)
            back, arithmetic = back.movedim(0, settings.time_axis), (settings.num_bits, torch.float32)
            of_x, of_max, of_min = activation_gradients((x, *factors), arithmetic, needs[:3], back)
        return (of_x, of_max, of_min, of_weight, of_scale, of_bias, *[None] * 6)
