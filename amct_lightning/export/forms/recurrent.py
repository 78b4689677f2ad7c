"""LSTM and GRU in all three forms. Gates are in ONNX order there, and time is the first axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from amct_lightning.export.forms import fake_quant, qdq
from amct_lightning.export.forms.deploy import dequant_parameter
from amct_lightning.export.forms.editing import Site
from amct_lightning.export.forms.operators import packed
from amct_lightning.export.numbers import Array, Factors, Product
from amct_lightning.layer_types import LAYER_TYPES, supported_class

_QUANT_DTYPES = {"INT8": 2, "INT16": 6}
_SQUEEZE_TAKES_INPUT = 13  # the opset from which axes are an input


def deploy_recurrent(site: Site) -> list[ir.Value]:
    """Write a recurrent layer as the hardware runs it.

    Args:
        site: Where it is called.

    Returns:
        All outputs, then the last state.
    """
    factors, hidden = site.numbers.input, _hidden(site)
    if factors.type not in _QUANT_DTYPES:
        raise RuntimeError(
            f"Layer '{site.numbers.name}' has {factors.type} activations, and the hardware runs a {_kind(site)} with "
            f'{" or ".join(_QUANT_DTYPES)} only. Set dst_type of its activations to "INT8", or leave it in float.'
        )
    parts = [site.numbers.product, _recurrent(site)]
    attributes = {
        "hidden_size": site.layer.hidden_size,
        **({"linear_before_reset": 1} if _kind(site) == "GRU" else {"input_forget": 0}),
        "activations": ir.AttrStrings("activations", []),
        "activation_alpha": ir.AttrFloat32s("activation_alpha", []),
        "activation_beta": ir.AttrFloat32s("activation_beta", []),
        "direction": "forward",
        "clip": -1.0,
        **_quant_attributes("x", factors),
        **_quant_attributes("h", hidden),
        "quant_dtype": _QUANT_DTYPES[factors.type],
    }
    names = (site.weight_name, f"{site.numbers.name}.sub_module.recurrent_weight")
    weights = [_deploy_weight(site, name, part) for name, part in zip(names, parts, strict=True)]
    bias = None if parts[0].bias is None else _joined(site, [_whole(part.bias) for part in parts])
    dequant = _joined(site, [_whole(part.dequant, part.codes.shape[0]) for part in parts])
    x, *state = _time_first(site)
    inputs = [
        x,
        *weights,
        *state,
        None if bias is None else site.edit.initializer(site.bias_name, bias[None]),
        None,
        None,
        site.edit.initializer(f"{site.numbers.name}.dequant.param", dequant_parameter(dequant)),
    ]
    return _finished(site, f"Basic{_kind(site)}InplaceFillWindowCache", inputs, attributes)


def fake_quant_recurrent(site: Site) -> list[ir.Value]:
    """Write a recurrent layer in float; what it quantizes are the input, the initial state and the weights.

    Args:
        site: Where it is called.

    Returns:
        All outputs, then the last state.
    """
    x, h, *cell = _time_first(site)
    state = _antiquantized(site, h, _hidden(site), "1")  # before the input, as AMCT writes it
    given = _antiquantized(site, x, site.numbers.input, "")
    parts = [site.numbers.product, _recurrent(site)]
    names = (site.weight_name, f"{site.numbers.name}.sub_module.recurrent_weight")
    weights = [
        site.edit.initializer(name, _in_onnx_order(site, _float_weight(part))[None])
        for name, part in zip(names, parts, strict=True)
    ]
    bias = None
    if parts[0].bias is not None:
        joined = _joined(
            site, [_whole(part.bias).astype(np.float32) * _whole(part.dequant, len(part.codes)) for part in parts]
        )
        bias = site.edit.initializer(site.bias_name, joined[None])
    return _finished(site, _kind(site), [given, *weights, bias, None, state, *cell], _standard_attributes(site))


def qdq_recurrent(site: Site) -> list[ir.Value]:
    """Write a recurrent layer in float on what quantizing and dequantizing leave of its inputs.

    Args:
        site: Where it is called.

    Returns:
        All outputs, then the last state.
    """
    x, h, *cell = _time_first(site)
    name = site.numbers.name
    given = qdq.quantized_dequantized(site, x, site.numbers.input, f"{site.name}.quant")
    state = qdq.quantized_dequantized(site, h, _hidden(site), f"{site.name}.quant1")
    parts = [site.numbers.product, _recurrent(site)]
    names = (site.weight_name, f"{name}.sub_module.recurrent_weight")
    weights = [_qdq_weight(site, weight, part) for weight, part in zip(names, parts, strict=True)]
    bias = None
    if parts[0].bias is not None:
        integers = _joined(site, [_whole(part.bias) for part in parts])
        scale = _joined(site, [_whole(part.dequant, len(part.codes)) for part in parts])
        stored = site.edit.initializer(site.bias_name, integers[None])
        scales = site.edit.initializer(f"{site.bias_name}.scale", scale)
        bias = site.edit.node("DequantizeLinear", (stored, scales), f"{site.bias_name}.dequant", {"axis": 1})[0]
    return _finished(site, _kind(site), [given, *weights, bias, None, state, *cell], _standard_attributes(site))


def _kind(site: Site) -> str:
    return supported_class(site.layer).__name__


def _hidden(site: Site) -> Factors:
    assert site.numbers.hidden is not None
    return site.numbers.hidden


def _recurrent(site: Site) -> Product:
    assert site.numbers.recurrent is not None
    return site.numbers.recurrent


def _standard_attributes(site: Site) -> dict[str, Any]:
    attributes = {"hidden_size": site.layer.hidden_size}
    return attributes | ({"linear_before_reset": 1} if _kind(site) == "GRU" else {})


def _quant_attributes(suffix: str, factors: Factors) -> dict[str, Any]:
    return {
        f"quant_sqrt_mode_{suffix}": 0,
        f"quant_scale_{suffix}": float(factors.reciprocal),
        f"quant_offset_{suffix}": float(factors.offset),
    }


def _deploy_weight(site: Site, name: str, part: Product) -> ir.Value:
    codes = _in_onnx_order(site, part.codes)[None]
    return site.edit.initializer(name, packed(codes, 2, site.numbers.name) if part.type == "INT4" else codes)


def _qdq_weight(site: Site, name: str, part: Product) -> ir.Value:
    by_row = part.scale_w.size > 1
    scales = _in_onnx_order(site, part.scale_w) if by_row else part.scale_w
    ordered = Product(part.codes, scales, part.type, part.dequant, part.bias, part.float_bias)
    return qdq.dequantized_weight(site, _in_onnx_order(site, part.codes)[None], ordered, 1, name)


def _float_weight(part: Product) -> Array:
    return part.codes.astype(np.float32) * part.scale_w.reshape(-1, 1)


def _whole(values: Array | None, length: int = 0) -> Array:
    """Return numbers one per row, where there may be a single one for all."""
    assert values is not None
    return np.broadcast_to(values, (length,)) if values.size == 1 and length else values


def _in_onnx_order(site: Site, values: Array) -> Array:
    gates = LAYER_TYPES[supported_class(site.layer)].gates
    return values.reshape(len(gates), -1, *values.shape[1:])[list(gates)].reshape(values.shape)


def _joined(site: Site, parts: list[Array]) -> Array:
    """Return the numbers of both weights one after the other, 1-d."""
    return np.concatenate([_in_onnx_order(site, part) for part in parts])


def _antiquantized(site: Site, x: ir.Value, factors: Factors, suffix: str) -> ir.Value:
    integers = fake_quant.quantized(site, x, factors, f"{site.name}.quant{suffix}")
    name = f"{site.name}.anti_quant{suffix}.fake_antiquant"
    return site.edit.node(
        "Mul", (integers, site.edit.constant(f"{name}.scale", np.array(factors.scale))), f"{name}.mul"
    )[0]


def _time_first(site: Site) -> list[ir.Value]:
    x, *state = site.inputs
    if site.layer.batch_first:
        x = site.edit.node("Transpose", (x,), f"{_path(site)}/Transpose", {"perm": [1, 0, 2]})[0]
    return [x, *state]


def _finished(site: Site, operator: str, inputs: list[ir.Value | None], attributes: dict[str, Any]) -> list[ir.Value]:
    """Put the node there, and take the axis of the directions out of its outputs."""
    output, *last = site.edit.node(operator, inputs, site.name, attributes, outputs=len(site.inputs))
    name = f"{_path(site)}/Squeeze"
    if site.edit.opset >= _SQUEEZE_TAKES_INPUT:
        axes = site.edit.initializer(f"{site.numbers.name}.direction_axis", np.array([1], dtype=np.int64))
        output = site.edit.node("Squeeze", (output, axes), name)[0]
    else:
        output = site.edit.node("Squeeze", (output,), name, {"axes": [1]})[0]
    if site.layer.batch_first:
        output = site.edit.node("Transpose", (output,), f"{_path(site)}/Transpose_1", {"perm": [1, 0, 2]})[0]
    return [output, *last]


def _path(site: Site) -> str:
    return f"/{site.name.replace('.', '/')}"
