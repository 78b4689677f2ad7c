"""When a layer is run as one operation for autograd, and how."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.modules.fused.function import Call, quantized_product
from amct_lightning.modules.fused.grid import GridProduct
from amct_lightning.modules.fused.integer import IntegerProduct, reason_against
from amct_lightning.modules.fused.products import Product
from amct_lightning.modules.grid.forward import check_served
from amct_lightning.quantizers import is_exporting
from amct_lightning.quantizers.executors import executor_for, resolved
from amct_lightning.quantizers.kept import evaluates
from amct_lightning.quantizers.rangeless import RangelessExecutor, RangelessQuantizer
from amct_lightning.quantizers.transforms import differentiating_forward, transforming

_PLAIN = (Tensor, nn.Parameter)


def runs_fused(layer: Any, input: Tensor, weight: Tensor) -> bool:
    """Tell whether a layer can be run as one operation now: graphs, transforms and subclasses of tensors take it apart.

    Args:
        layer: The layer.
        input: Its input.
        weight: Its weight, which a parametrization may make anew whenever it is asked for.
    """
    if torch.compiler.is_compiling() or transforming() or is_exporting() or differentiating_forward():
        return False
    bias = layer.bias
    plain = type(input) in _PLAIN and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    if not plain or input.is_neg() or weight.is_neg():  # memory does not say that a tensor is the negative of it
        return False
    return not (_is_watched(layer.input_quantizer) or _is_watched(layer.weight_quantizer))


def run_fused(layer: Any, product: Product, x: Tensor, weight: Tensor, observed: Tensor | None) -> Tensor:
    """Return the output of a quantized layer.

    Args:
        layer: The layer.
        product: The operation of the layer.
        x: The input.
        weight: The weight.
        observed: The input before it was padded, if it was.
    """
    for hook in layer.weight_quantizer._forward_pre_hooks.values():
        hook(layer.weight_quantizer, (weight,))
    bias, dtype = layer.bias, _autocast_dtype(x)
    executor = executor_for(layer.execution, x.device.type)
    if isinstance(layer.input_quantizer, RangelessQuantizer):
        executor = RangelessExecutor(executor, layer.input_quantizer)
    quantizers, with_graph = (layer.input_quantizer, layer.weight_quantizer), torch.is_grad_enabled()
    check_served(layer)
    on_grid, integer = layer.has_grid, None
    follows = on_grid and layer.bias_follows(x)
    if _in_integers(layer.execution, x.device.type) and not reason_against(layer, x.device):
        integer = IntegerProduct(layer, dtype)
    if with_graph:
        quantizers[1].forget(unless_evaluated=True)
        if integer is None and dtype is None and layer.serving is None:
            grid_or_not = on_grid, follows
            output = executor.product(quantizers, (x, weight, bias), product.geometry, grid_or_not)
            if output is not None:
                return output
    grid = GridProduct(product, executor, follows) if on_grid else None
    shares = not with_graph and evaluates(quantizers[1])
    call = Call(product, executor, *quantizers, layer.calibrates_input, observed, dtype, integer, grid, shares)
    tensors = x, weight, bias
    if not with_graph:
        return call.forward(*tensors)[0]
    if grid is None and dtype is None:
        output = executor.with_backward(lambda: call.forward(*tensors), quantizers, tensors, product.geometry)
        if output is not None:
            return output
    return quantized_product(call, *tensors)


@cache
def _in_integers(execution: str, device: str) -> bool:
    """Tell whether products are to be in integers; asked once, as :func:`executor_for`, for it looks for a compiler."""
    return resolved(execution, device) == "integer"


def _is_watched(module: nn.Module) -> bool:
    """Tell whether hooks see or change what goes into or comes out of a quantizer, which is not called here."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    changing = (hook for hook in module._forward_pre_hooks.values() if not getattr(hook, "leaves_inputs", False))
    return bool(module._forward_hooks) or any(True for _ in changing)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
