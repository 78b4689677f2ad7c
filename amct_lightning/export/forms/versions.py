"""Bringing a graph to a higher opset, which onnx does."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

_SMALL = 1024
"""Constants of up to so many bytes may be what the converter has to see, such as axes; larger ones are weights."""


_IR_VERSION = 10
"""The version of the file format that has all types; onnxruntime reads it since 1.18."""


def at_least(model: ir.Model, opset: int) -> ir.Model:
    """Return a copy of a graph whose opset is not lower than a given one.

    Args:
        model: The graph.
        opset: The opset.
    """
    copied = model.clone()
    if copied.opset_imports[""] >= opset:
        return copied
    weights = _taken_out(copied)
    proto: onnx.ModelProto = version_converter.convert_version(ir.to_proto(copied), opset)
    converted: ir.Model = ir.from_proto(proto)
    _put_back(converted, weights)
    converted.ir_version = _IR_VERSION
    return converted


def _taken_out(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Make inputs of the weights, which need not be copied, nor can be if they are larger than 2 GiB."""
    graph, weights = model.graph, {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL:
            weights[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return weights


def _put_back(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> None:
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        value.const_value = weights[str(value.name)]
        graph.register_initializer(value)
