"""The product of a layer on the grid of device or server: exact integer sums, an integer bias, a scale of 19 bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from amct_lightning.modules.deployed import bias_codes, scales_of_sums
from amct_lightning.modules.grid.codes import Codes
from amct_lightning.quantizers.functional import half_range, kept_bits
from amct_lightning.quantizers.transforms import call, differentiable_once, direct_form, transforming

EXACT_IN_FLOAT32 = 2**24
"""Sums of integers are exact in float32, in any order, while the sum of their magnitudes is below this."""

Operate = Callable[[Tensor, Tensor], Tensor]
"""The operation of a layer, without its bias: from input and weight to the sums."""


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a float layer gives its output: that of autocast, or that of its input.

    Args:
        x: The input.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     output_dtype(torch.ones(1))
        torch.bfloat16
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if _is_autocast(kind) and x.dtype != torch.float64 else x.dtype


def integer_product(operate: Operate, x: Codes, weight: Codes, bias: Tensor | None, terms: int, exact: bool) -> Tensor:
    """Return ``(sum(x * w) + round(bias / s)) * s19`` in float32, where ``s`` is the product of both scales.

    Servers have other scales there, see :func:`amct_lightning.modules.deployed.scales_of_sums`.

    Gradients are those of ``sum((x * s_x) * (w * s_w)) + bias``.

    Args:
        operate: From input and weight to the sums, output channels at the axis 1 of a convolution, else last.
        x: Codes of the input.
        weight: Codes of the weight.
        bias: The bias, 1-d.
        terms: The number of products in a sum.
        exact: Whether the sums are exact, as on the device, or those of float32, which are so while they are below
            2**24; what training needs them for does not ask for more.

    Example:
        >>> x = Codes(torch.tensor([3.0, 4.0]), torch.tensor(0.1), 8)
        >>> weight = Codes(torch.tensor([[5.0, 6.0]]), torch.tensor([0.3]), 8)
        >>> integer_product(torch.nn.functional.linear, x, weight, torch.tensor([0.05]), terms=2, exact=True)
        tensor([1.2299])
    """
    with torch.no_grad():
        scale = weight.scale * x.scale
        scale = scale.view(-1, *[1] * (weight.values.dim() - 2))
        scale, kept = scales_of_sums(scale, kept_bits(scale), x.dtype)
        served = x.dtype is not None
    bias = None if bias is None else bias.float().view(-1, *[1] * (weight.values.dim() - 2))
    with in_float32(x.values.device.type):
        if not exact:
            return _dequantize(operate(x.values, weight.values), bias, scale, kept, None, served)
        whole = _exact_sums(operate, x, weight, None if bias is None else bias_codes(bias, scale, served), terms)
        tensors = (x.values, weight.values, *([] if bias is None else [bias]))
        if not (transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))):
            return whole * kept
        return _dequantize(operate(x.values, weight.values), bias, scale, kept, whole, served)


def replaced(output: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` with the gradient of ``output``.

    Args:
        output: What has the gradient.
        values: What it is to be, in the same shape and dtype; without a gradient.
    """
    return call(_Replaced, _REPLACED, output, values)


@torch.no_grad()
def _exact_sums(operate: Operate, x: Codes, weight: Codes, bias: Tensor | None, terms: int) -> Tensor:
    """Return sums and bias, exact in 32 bits and rounded to float32 once.

    Where they could exceed what float32 adds exactly, the input is divided into digits whose sums cannot, as float64
    is not to be had on every device. Above 2**16 products of INT8 they could still; then so could 32 bits.
    """
    count = _digits(terms, x.num_bits, weight.num_bits)
    if count == 1:
        sums = torch.round(operate(x.values, weight.values))  # some algorithms of convolutions round on the way
        return sums if bias is None else sums + bias
    width = -(-x.num_bits // count)
    rest, total = x.values, None
    for index in range(count):
        above = torch.floor(rest * 2.0**-width)
        digit = rest if index == count - 1 else rest - above * 2.0**width
        sums = torch.round(operate(digit, weight.values)).to(torch.int32) * 2 ** (width * index)
        total, rest = sums if total is None else total + sums, above
    assert total is not None
    whole: Tensor = total if bias is None else total + bias.to(torch.int32)
    return whole.float()


def _digits(terms: int, num_bits: int, weight_bits: int) -> int:
    """Return into how many digits the codes of an input are divided so that sums over one of them are exact."""
    room = EXACT_IN_FLOAT32 / (max(terms, 1) * half_range(weight_bits))
    fitting = (count for count in range(1, num_bits) if 2 ** -(-num_bits // count) < room)
    return next(fitting, num_bits)


def _is_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def in_float32(kind: str) -> AbstractContextManager[Any]:
    """Keep autocast off, which would round codes and sums.

    Args:
        kind: Type of the device.
    """
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else nullcontext()


def _dequantize(
    sums: Tensor, bias: Tensor | None, scale: Tensor, kept: Tensor, whole: Tensor | None, served: bool
) -> Tensor:
    """Return ``(sums + round(bias / scale)) * kept``.

    Args:
        sums: The sums.
        bias: The bias, shaped to broadcast over them.
        scale: The scale for the bias and all gradients.
        kept: What the hardware keeps of it.
        whole: The sums with the bias, if they are known better than as the sum of both.
        served: Whether they are those of a server.
    """
    other = None if kept is scale else kept  # torch.compile takes no tensor twice
    return call(_Dequantize, _DEQUANTIZE, sums, bias, scale, other, whole, served)


class _Dequantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        sums: Tensor, bias: Tensor | None, scale: Tensor, kept: Tensor | None, whole: Tensor | None, served: bool
    ) -> Tensor:
        if whole is None:
            whole = sums if bias is None else sums + bias_codes(bias, scale, served)
        return whole * (scale if kept is None else kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, scale, *_ = inputs
        ctx.shape = None if bias is None else bias.shape
        ctx.save_for_backward(scale)
        if transforming():
            ctx.save_for_forward(scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_bias = grad.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad * ctx.saved_tensors[0], of_bias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, sums: Tensor | None, bias: Tensor | None, *_: Any) -> Tensor | None:
        if sums is None:
            return bias
        tangent: Tensor = sums * ctx.saved_tensors[0]
        return tangent if bias is None else tangent + bias


_DEQUANTIZE = direct_form(_Dequantize)


class _Replaced(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(_output: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(_ctx: Any, output: Tensor, _values: Any) -> Tensor:
        return output.view_as(output)


_REPLACED = direct_form(_Replaced)
