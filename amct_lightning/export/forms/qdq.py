"""The file with QuantizeLinear and DequantizeLinear, which onnxruntime and compilers of other makers take."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from amct_lightning.export.forms.editing import Site
from amct_lightning.export.forms.operators import operator_of
from amct_lightning.export.numbers import Array, Factors, Product

_OPSET = 13
"""The first one with scales per channel."""

_OPSET_OF_OTHER_TYPES = 21
"""The first one with INT4 and INT16."""

_TYPES = {"INT4": np.dtype(ml_dtypes.int4), "INT8": np.dtype(np.int8), "INT16": np.dtype(np.int16)}


def lowest_opset(types: Iterable[str]) -> int:
    """Return the lowest opset in which values of some types can be quantized.

    Args:
        types: ``INT8`` and so on.

    Example:
        >>> lowest_opset(["INT8"]), lowest_opset(["INT8", "INT4"])
        (13, 21)
    """
    return _OPSET if set(types) <= {"INT8"} else _OPSET_OF_OTHER_TYPES


def qdq_layer(site: Site) -> list[ir.Value]:
    """Write a layer without recurrence as a float operator on what quantizing and dequantizing leave of its inputs.

    Args:
        site: Where it is called.

    Returns:
        Its output.
    """
    numbers, edit, operator = site.numbers, site.edit, operator_of(site)
    product = numbers.product
    codes = operator.weight(product.codes)
    if operator.type == "ConvTranspose" and product.scale_w.size > 1 and site.layer.groups > 1:
        weight = _grouped_weight(site, codes, product)
    else:
        weight = dequantized_weight(site, codes, product, operator.channel_axis, site.weight_name)
    inputs = [quantized_dequantized(site, site.inputs[0], numbers.input, f"{site.name}.quant"), weight]
    if operator.adds_bias and product.bias is not None:
        inputs.append(dequantized_bias(site, product, site.bias_name))
    return [operator.bias_after(site, edit.node(operator.type, inputs, site.name, operator.attributes)[0])]


def quantized_dequantized(site: Site, x: ir.Value, factors: Factors, name: str) -> ir.Value:
    """Quantize a tensor and dequantize it again.

    Args:
        site: Where the layer is called.
        x: The tensor.
        factors: How it is quantized.
        name: What the nodes are named by.
    """
    key = ("quant", x, site.edit.at.graph, float(factors.scale), factors.offset, factors.type)
    if key not in site.edit.merged:
        scale = site.edit.initializer(f"{name}.scale", np.array(factors.scale))
        zero = site.edit.initializer(f"{name}.zero_point", np.array(factors.offset, dtype=_TYPES[factors.type]))
        codes = site.edit.node("QuantizeLinear", (x, scale, zero), name)[0]
        site.edit.merged[key] = site.edit.node("DequantizeLinear", (codes, scale, zero), f"{name}.dequant")[0]
    return site.edit.merged[key]


def dequantized_weight(site: Site, codes: Array, product: Product, axis: int, name: str) -> ir.Value:
    """Add a weight as integers, and dequantize it.

    Args:
        site: Where the layer is called.
        codes: Its integers as the operator lays them out.
        product: Its scales.
        axis: The axis of the output channels.
        name: Its name.
    """
    stored = site.edit.initializer(name, codes.astype(_TYPES[product.type]))
    if product.group_size:
        blocks = product.scale_w.reshape(codes.shape[axis], -1).T
        scale = site.edit.initializer(f"{name}.scale", blocks)
        return _once(site, (stored, scale), f"{name}.dequant", {"axis": 0, "block_size": product.group_size})
    by_channel = product.scale_w.size > 1
    scale = site.edit.initializer(f"{name}.scale", product.scale_w if by_channel else product.scale_w.reshape(()))
    return _once(site, (stored, scale), f"{name}.dequant", {"axis": axis} if by_channel else {})


def dequantized_bias(site: Site, product: Product, name: str) -> ir.Value:
    """Add a bias as 32-bit integers, and dequantize it.

    Args:
        site: Where the layer is called.
        product: The bias and the scales of the sums.
        name: Its name.
    """
    assert product.bias is not None
    stored = site.edit.initializer(name, product.bias)
    by_channel = product.dequant.size > 1
    scale = site.edit.initializer(f"{name}.scale", product.dequant if by_channel else product.dequant.reshape(()))
    return _once(site, (stored, scale), f"{name}.dequant", {"axis": 0} if by_channel else {})


def _once(site: Site, inputs: tuple[ir.Value, ...], name: str, attributes: dict[str, int]) -> ir.Value:
    key = ("dequant", name, site.edit.at.graph)
    if key not in site.edit.merged:
        site.edit.merged[key] = site.edit.node("DequantizeLinear", inputs, name, attributes)[0]
    return site.edit.merged[key]


def _grouped_weight(site: Site, codes: Array, product: Product) -> ir.Value:
    """Dequantize the weight of a grouped transposed convolution with its output channels, on two axes, on one."""
    edit, groups, (inputs, per_group, *kernel) = site.edit, site.layer.groups, codes.shape
    together = codes.reshape(groups, inputs // groups, per_group, *kernel).swapaxes(0, 1)
    stored = together.reshape(inputs // groups, groups * per_group, *kernel)
    weight = dequantized_weight(site, stored, product, 1, site.weight_name)
    swapped = [1, 0, *range(2, codes.ndim + 1)]
    for step, shape in (("split", together.shape), ("join", codes.shape)):
        if step == "join":
            weight = edit.node("Transpose", (weight,), f"{site.weight_name}.swap", {"perm": swapped})[0]
        target = edit.initializer(f"{site.weight_name}.{step}.shape", np.array(shape, dtype=np.int64))
        weight = edit.node("Reshape", (weight, target), f"{site.weight_name}.{step}")[0]
    return weight
