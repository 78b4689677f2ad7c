"""QDQ models of the recorded cases, built from their deploy models and records."""

from __future__ import annotations

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from amct_lightning.export.integer.graph_file import GraphFile
from amct_lightning.export.integer.units import IntegerLayer
from amct_lightning.export.verify.float_forms import reader_of
from amct_lightning.record import LayerRecord
from tests.export.golden_files import golden_case, golden_inputs, golden_model

QDQ_CASES = ["cnn_bn_relu__default", "mlp__a16w8_json", "mlp__a4w4_json", "res_down__default"]
TYPES = {"INT4": TensorProto.INT4, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16}


def qdq_model(case: str) -> ModelProto:
    """The QDQ model of a case that has nothing but operators that are alike in opset 11 and 21."""
    deploy = golden_model(case, "deploy")
    file = GraphFile(deploy)
    units = {unit.name: unit for unit in reader_of("deploy", file).units}
    record = golden_case(case).record
    nodes: list[NodeProto] = []
    arrays: list[TensorProto] = []
    for node in deploy.graph.node:
        if node.op_type == "AscendQuant":
            layer = node.name.removesuffix(".quant")
            nodes += quantize(node, record[layer], arrays)
        elif node.name in units:
            nodes += layer_nodes(node, units[node.name], record[node.name], golden_inputs(case, deploy), arrays, case)
        elif node.op_type == "AscendDequant":
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]], node.name))
        elif node.op_type != "Cast":
            nodes.append(node)
    arrays += [tensor for tensor in deploy.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    graph = helper.make_graph(nodes, case, deploy.graph.input, deploy.graph.output, arrays)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def quantize(node: NodeProto, record: LayerRecord, arrays: list[TensorProto]) -> list[NodeProto]:
    scale, zero, codes = f"{node.name}.scale", f"{node.name}.zero", f"{node.name}.codes"
    arrays.append(numpy_helper.from_array(np.array(record.scale_d, np.float32), scale))
    arrays.append(helper.make_tensor(zero, TYPES[record.act_type], [], [record.offset_d]))
    return [
        helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [codes], node.name),
        helper.make_node("DequantizeLinear", [codes, scale, zero], [node.output[0]], f"{node.name}.dequant"),
    ]


def layer_nodes(
    node: NodeProto,
    unit: IntegerLayer,
    record: LayerRecord,
    inputs: dict[str, np.ndarray],
    arrays: list[TensorProto],
    case: str,
) -> list[NodeProto]:
    name = unit.name
    layer = golden_case(case).float_model().get_submodule(name)
    channels = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
    weight = unit.unpacked(channels)
    scale = np.array(record.scale_w, np.float32)
    axis = {"Conv": 0, "ConvTranspose": 1}.get(unit.kind, weight.ndim - 1)
    kind = TYPES[record.wts_type]
    arrays.append(helper.make_tensor(f"{name}.weight", kind, weight.shape, weight.ravel().tolist()))
    arrays.append(numpy_helper.from_array(scale if scale.size > 1 else scale[0], f"{name}.weight.scale"))
    made = [
        helper.make_node(
            "DequantizeLinear", [f"{name}.weight", f"{name}.weight.scale"], [f"{name}.w"], f"{name}.weight.dequant",
            axis=axis,
        )
    ]  # fmt: skip
    reads = [node.input[0], f"{name}.w"]
    if unit.bias is not None:
        sums = (torch.tensor(scale) * torch.tensor(record.scale_d)).numpy()
        arrays.append(numpy_helper.from_array(unit.bias.astype(np.int32), f"{name}.bias"))
        arrays.append(numpy_helper.from_array(sums if sums.size > 1 else sums[0], f"{name}.bias.scale"))
        made.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}.bias", f"{name}.bias.scale"], [f"{name}.b"], f"{name}.bias.dequant",
                axis=0,
            )
        )  # fmt: skip
        reads.append(f"{name}.b")
    operator = helper.make_node(node.op_type, reads, list(node.output), name)
    operator.attribute.extend(node.attribute)
    return [*made, operator]
