"""Small deploy models, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def parameter(scale: Any) -> np.ndarray:
    """The dequantization parameters of scales."""
    return np.atleast_1d(np.asarray(scale, np.float32)).view(np.uint32).astype(np.uint64)


def quant(
    tensor: str, scale: float = 1.0, offset: float = 0.0, bits: str = "INT8", name: str = "layer.quant"
) -> NodeProto:
    return helper.make_node("AscendQuant", [tensor], [f"{name}.out"], name, scale=scale, offset=offset, dst_type=bits)


def dequant(tensor: str, output: str = "y", name: str = "layer.dequant") -> NodeProto:
    return helper.make_node("AscendDequant", [tensor, "layer.dequant.param"], [output], name, dtype=0)


def network(nodes: list[NodeProto], arrays: dict[str, np.ndarray], **shapes: list[Any]) -> ModelProto:
    """A model with the inputs of the given shapes and the output ``y``."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, initializers)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 11)])


def one_layer(
    kind: str,
    weight: np.ndarray,
    shape: list[Any],
    bias: np.ndarray | None = None,
    scale: Any = 1.0,
    quantizer: dict[str, Any] | None = None,
    **attributes: Any,
) -> ModelProto:
    """A model of one layer."""
    inputs = ["layer.quant.out", "w", *([] if bias is None else ["b"])]
    layer = helper.make_node(kind, inputs, ["sums"], "layer", **attributes)
    arrays = {"w": weight, "layer.dequant.param": parameter(scale)} | ({} if bias is None else {"b": bias})
    return network([quant("x", **(quantizer or {})), layer, dequant("sums")], arrays, x=shape)
