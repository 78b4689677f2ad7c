"""The file for the Ascend compiler: integer operators between AscendQuant and AscendDequant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from amct_lightning.export.forms.editing import Site
from amct_lightning.export.forms.operators import operator_of, packed
from amct_lightning.export.numbers import Array

_FLOAT = int(ir.DataType.FLOAT)


def deploy_layer(site: Site) -> list[ir.Value]:
    """Write a layer without recurrence as the hardware runs it.

    Args:
        site: Where it is called.

    Returns:
        Its output.
    """
    numbers, edit, operator = site.numbers, site.edit, operator_of(site)
    product = numbers.product
    inputs = [_quantized(site), _weight(site, operator.weight(product.codes), operator.packed_axis)]
    if operator.adds_bias and product.bias is not None:
        inputs.append(_bias(site, product.bias))
    sums = edit.node(operator.type, inputs, site.name, operator.attributes)[0]
    parameter = edit.initializer(f"{numbers.name}.dequant.param", dequant_parameter(product.dequant))
    output = edit.node("AscendDequant", (sums, parameter), f"{site.name}.dequant", {"dtype": 0})[0]
    return [operator.bias_after(site, output)]


def dequant_parameter(scale: Array) -> Array:
    """Return dequantization scales as the hardware takes them: their bits in the lower half of 64.

    Args:
        scale: Scales, float32.

    Example:
        >>> dequant_parameter(np.array([1.0], dtype=np.float32))
        array([1065353216], dtype=uint64)
    """
    return scale.view(np.uint32).astype(np.uint64)


def _quantized(site: Site) -> ir.Value:
    """Return the quantized input; layers that read one tensor with one set of factors have it in common."""
    factors, x = site.numbers.input, site.inputs[0]
    attributes = {"scale": float(factors.reciprocal), "offset": float(factors.offset), "dst_type": factors.type}
    key = ("quant", x, site.edit.at.graph, *attributes.values())
    if key not in site.edit.merged:
        site.edit.merged[key] = site.edit.node("AscendQuant", (x,), f"{site.name}.quant", attributes)[0]
    return site.edit.merged[key]


def _weight(site: Site, codes: Array, axis: int) -> ir.Value:
    if site.numbers.product.type == "INT4":
        codes = packed(codes, axis, site.numbers.name)
    return site.edit.initializer(site.weight_name, codes)


def _bias(site: Site, bias: Array) -> ir.Value:
    value = site.edit.initializer(site.bias_name, bias)
    if site.numbers.input.type != "INT4":
        return value
    key = ("bias", value)
    if key not in site.edit.merged:
        site.edit.merged[key] = site.edit.node("Cast", (value,), f"{site.numbers.name}.bias_quant", {"to": _FLOAT})[0]
    return site.edit.merged[key]
