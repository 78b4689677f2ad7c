"""The autograd function of a quantized layer: it keeps input and weight, and rebuilds their quantized values."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amct_lightning.modules.fused.grid import GridProduct
from amct_lightning.modules.fused.integer import IntegerProduct
from amct_lightning.modules.fused.products import Gradients, Needs, Product
from amct_lightning.quantizers import ActivationQuantizer, LearnedWeightQuantizer, WeightQuantizer
from amct_lightning.quantizers.executors import Executor, Factors, WeightFactors
from amct_lightning.quantizers.kept import kept_weight
from amct_lightning.quantizers.rangeless import RangelessQuantizer
from amct_lightning.quantizers.transforms import differentiable_once


@dataclass
class Call:
    """How a layer is called.

    Attributes:
        product: Its operation.
        executor: What runs the formulas of its quantizers.
        input_quantizer: Quantizer of the input.
        weight_quantizer: Quantizer of the weight.
        observe: Whether a calibrating quantizer counts the input as a batch.
        observed: The input before it was padded, to calibrate on.
        dtype: Dtype of the product, that of autocast; ``None`` for those of input and weight.
        integer: What computes the product in integers, if it is to be so.
        grid: What computes it on the device's grid, if it is to be so.
        evaluates: Whether it is an evaluation, whose next batch may have the same weight.
    """

    product: Product
    executor: Executor
    input_quantizer: ActivationQuantizer | RangelessQuantizer
    weight_quantizer: WeightQuantizer
    observe: bool
    observed: Tensor | None
    dtype: torch.dtype | None
    integer: IntegerProduct | None
    grid: GridProduct | None
    evaluates: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Factors, WeightFactors]:
        """Return the output and what input and weight were quantized with; without a graph."""
        # An executor for inputs without a range takes what has none; the grid and integers are not for these.
        inputs = typing.cast(ActivationQuantizer, self.input_quantizer)
        executor, quantizers = self.executor, (inputs, self.weight_quantizer)
        if self.grid is not None:
            on_grid = self.grid.forward(quantizers, (x, weight, bias), self.observe, self.observed)
            return on_grid[0].to(self.dtype or x.dtype), *on_grid[1:]
        if self.integer is not None:
            return self.integer.forward(executor, quantizers, (x, weight, bias), self.observe)
        values, factors = executor.quantize_input(quantizers[0], x, self.observe, self.observed)
        weights, weight_factors = self._quantized(weight)
        output = self.product.forward(cast(values, self.dtype), weights, cast(bias, self.dtype))
        return output, factors, weight_factors

    def _quantized(self, weight: Tensor) -> tuple[Tensor, WeightFactors]:
        """Return the quantized weight in the dtype of the product, and what it was quantized with."""
        quantizer = self.weight_quantizer

        def quantize() -> tuple[Tensor, WeightFactors]:
            weights, factors = self.executor.quantize_weight(quantizer, weight)
            return cast(weights, self.dtype), factors

        key = self.dtype, self.executor.name
        return kept_weight(quantizer, weight, key, quantize) if self.evaluates else quantize()


def quantized_product(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output of a layer from its quantized input and weight, with the gradients of AMCT.

    Args:
        call: How the layer is called.
        x: The input.
        weight: The weight.
        bias: The bias.
    """
    clips = call.input_quantizer.learned_clips
    scale = call.weight_quantizer.scale if isinstance(call.weight_quantizer, LearnedWeightQuantizer) else None
    tensors = x, weight, bias, *clips, scale
    output: Tensor = _QuantizedProduct.apply(*tensors, call)  # type: ignore[no-untyped-call]
    return output


class _QuantizedProduct(torch.autograd.Function):
    """Factors are no saved tensors: they are single numbers that nobody else has, and no float layer keeps them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        clip_max: Tensor | None,
        _min: Tensor | None,
        scale: Tensor | None,
        call: Call,
    ) -> Tensor:
        output, ctx.factors, ctx.weight_factors = call.forward(x, weight, bias)
        ctx.product, ctx.executor, ctx.dtype, ctx.grid = call.product, call.executor, call.dtype, call.grid
        ctx.bias_dtype = None if bias is None else bias.dtype
        _keep(ctx, call, x, weight, scale)
        ctx.anchors = (weight if clip_max is None else clip_max,)
        # What follows may change the output in place, which autograd refuses for a view that was made in here.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias, of_max, of_min, of_scale = ctx.needs_input_grad[:6]
        x, weight = _kept(ctx, grad)
        needs = (of_x or of_max or of_min, of_weight or of_scale, of_bias)
        grad_x, grad_weight, grad_bias = _product_gradients(ctx, grad, x, weight, needs)
        grad_max, grad_min, grad_scale = None, None, None
        if grad_x is not None:
            wanted = of_x, of_max, of_min
            grad_x, grad_max, grad_min = ctx.executor.input_gradients(x, grad_x, ctx.factors, wanted)
        if of_scale:
            grad_scale = ctx.executor.scale_gradient(weight, grad_weight, ctx.weight_factors)
        grad_weight = cast(grad_weight, weight.dtype) if of_weight else None
        return grad_x, grad_weight, cast(grad_bias, ctx.bias_dtype), grad_max, grad_min, grad_scale, None


def _keep(ctx: Any, call: Call, x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Keep what backward needs: nothing if it is for a bias only, and no parameter that the float layer does not keep.

    Such a parameter is there anyway; its version tells whether it is as it was. The input is for the gradients of its
    clips, of the weight and of the scales of that.
    """
    needed = any(ctx.needs_input_grad[index] for index in (0, 1, 3, 4, 5))
    has_clips = isinstance(call.input_quantizer, ActivationQuantizer)
    ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
    ctx.keeps_input = needed and (has_clips or any(ctx.needs_input_grad[index] for index in (1, 5)))
    keeps_weight = needed and (x.requires_grad or call.product.keeps_both)
    parameters = [scale] if keeps_weight or not needed else [weight, scale]
    ctx.parameters = [(part, part._version) for part in parameters if needed and part is not None]
    ctx.save_for_backward(*((x,) if ctx.keeps_input else ()), *((weight,) if keeps_weight else ()))


def _kept(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and weight; without either, tensors that nobody looks at."""
    for parameter, version in ctx.parameters:
        if parameter._version != version:
            raise RuntimeError(
                "The weight or the learned scale of a quantized layer was changed in place between its forward and its "
                "backward, which needs it as it was. Call backward before the optimizer steps."
            )
    tensors = ctx.saved_tensors  # read once, as activation checkpointing demands
    if not tensors:
        return grad, grad
    if not ctx.keeps_input:  # of which only shape and dtype count
        return grad.new_empty(1, dtype=ctx.input_dtype).expand(ctx.input_shape), tensors[0]
    return tensors[0], tensors[1] if len(tensors) > 1 else ctx.parameters[0][0]


def _product_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
    """Return the gradients of the product; what was rebuilt for them is gone when it returns."""
    if ctx.grid is not None:
        of_grid: Gradients = ctx.grid.backward(grad, (x, weight), (ctx.factors, ctx.weight_factors), needs)
        return of_grid
    values = ctx.executor.rebuild_input(x, ctx.factors) if needs[1] else x
    weights = ctx.executor.rebuild_weight(weight, ctx.weight_factors) if needs[0] else weight
    found: Gradients = ctx.product.backward(grad, cast(values, ctx.dtype), cast(weights, ctx.dtype), needs)
    return found


def cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """Return a tensor in a dtype, or as it is if there is none of either."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
