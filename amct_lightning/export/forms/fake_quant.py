"""The file that computes in float what the deployed one computes in integers; it runs in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from amct_lightning.export.forms.editing import Site
from amct_lightning.export.forms.operators import operator_of
from amct_lightning.export.numbers import Factors
from amct_lightning.quantizers.functional import half_range


def fake_quant_layer(site: Site) -> list[ir.Value]:
    """Write a layer without recurrence with its integers as floating numbers.

    Args:
        site: Where it is called.

    Returns:
        Its output.
    """
    numbers, edit, operator = site.numbers, site.edit, operator_of(site)
    product = numbers.product
    weight = edit.initializer(site.weight_name, operator.weight(product.codes).astype(np.float32))
    inputs = [quantized(site, site.inputs[0], numbers.input, f"{site.name}.quant"), weight]
    if operator.adds_bias and product.bias is not None:
        inputs.append(edit.initializer(site.bias_name, product.bias.astype(np.float32)))
    sums = edit.node(operator.type, inputs, site.name, operator.attributes)[0]
    scale = edit.constant(f"{numbers.name}.fakedequant.dqscale", product.dequant.reshape(operator.channel_shape))
    output = edit.node("Mul", (sums, scale), f"{site.name}.fakedequant.mul")[0]
    return [operator.bias_after(site, output)]


def quantized(site: Site, x: ir.Value, factors: Factors, name: str) -> ir.Value:
    """Quantize a tensor into its integers, less the offset, in float.

    Args:
        site: Where the layer is called.
        x: The tensor.
        factors: How it is quantized.
        name: What the nodes are named by.
    """
    key = ("quant", x, site.edit.at.graph, float(factors.scale), factors.offset, factors.type)
    if key in site.edit.merged:
        return site.edit.merged[key]
    h = half_range(factors.bits)
    values = {"scale": factors.reciprocal, "offset": factors.offset, "min_val": -h, "max_val": h - 1}
    scale, offset, smallest, largest = (
        site.edit.constant(f"{name}.fakequant.{key}", np.array(value, dtype=np.float32))
        for key, value in values.items()
    )
    steps = (("mul", (scale,)), ("round", ()), ("add", (offset,)), ("clip", (smallest, largest)), ("sub", (offset,)))
    for step, others in steps:
        x = site.edit.node(step.capitalize(), (x, *others), f"{name}.fakequant.{step}")[0]
    site.edit.merged[key] = x
    return x
