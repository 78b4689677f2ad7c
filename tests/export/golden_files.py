"""The recorded exports as ONNX models again."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.golden_data import GOLDEN, ModelCase, model_case

EXPORTED = sorted(path.parent.name for path in GOLDEN.glob("models_data/*/export.json"))
"""The cases that AMCT has exported."""
RECURRENT = [name for name in EXPORTED if name.startswith(("lstm", "gru"))]
FEED_FORWARD = [name for name in EXPORTED if name not in RECURRENT]


def golden_model(case: str, form: str) -> ModelProto:
    """Return a recorded export as a model, to be changed as one likes."""
    return copy.deepcopy(_recorded(case, form))


@cache
def _recorded(case: str, form: str) -> ModelProto:
    entry = json.loads((GOLDEN / "models_data" / case / "export.json").read_text())[form]
    graph = helper.make_graph(
        [_node(node) for node in entry["nodes"]],
        case,
        [_value(value) for value in entry["inputs"]],
        [_value(value) for value in entry["outputs"]],
        [numpy_helper.from_array(_array(item), item["name"]) for item in entry["initializers"]],
    )
    opsets = [helper.make_opsetid(item["domain"], item["version"]) for item in entry["opset"]]
    return helper.make_model(graph, ir_version=entry["ir_version"], opset_imports=opsets)


def golden_inputs(case: str, model: ModelProto) -> dict[str, np.ndarray]:
    """Return the evaluation batch of a case by the names of a model's inputs."""
    tensors = golden_case(case).group("eval_x/")
    return {value.name: tensor.numpy() for value, tensor in zip(model.graph.input, tensors, strict=True)}


def golden_case(case: str) -> ModelCase:
    return model_case(case)


def _array(item: dict[str, Any]) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, item["dtype"]))
    return np.array([_number(value) for value in item["values"]], dtype).reshape(item["shape"])


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def _node(entry: dict[str, Any]) -> Any:
    node = helper.make_node(entry["op_type"], entry["inputs"], entry["outputs"], entry["name"])
    for name, attribute in entry["attributes"].items():
        value = attribute["value"]
        if attribute["type"] == "TENSOR":
            value = numpy_helper.from_array(_array(value))
        if value == []:
            node.attribute.append(helper.make_attribute(name, value, attr_type=helper.AttributeProto.STRINGS))
        else:
            node.attribute.append(helper.make_attribute(name, value))
    return node


def _value(entry: dict[str, Any]) -> Any:
    return helper.make_tensor_value_info(entry["name"], getattr(TensorProto, entry["elem_type"]), entry["shape"])
