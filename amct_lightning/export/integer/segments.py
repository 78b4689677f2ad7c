"""The float operators between the quantized layers, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from amct_lightning.export.integer.graph_file import GraphFile, read_by

Arrays = Mapping[str, np.ndarray]
"""Name of a tensor -> its numbers."""


def session(model: ModelProto | str, label: str) -> Any:
    """Return an onnxruntime session on the CPU that computes node by node, as the file says.

    Args:
        model: The model, or the path of its file, which large models with data beside them need.
        label: What messages call it.

    Raises:
        ImportError: If onnxruntime is not installed.
        ValueError: If onnxruntime refuses the model.
    """
    try:
        import onnxruntime  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as error:
        raise ImportError(
            "onnxruntime runs what an exported file computes in float, and is not installed. Install it with "
            "pip install 'amct_lightning[onnx]'."
        ) from error
    options = onnxruntime.SessionOptions()
    # Fused operators round in other places, and what is fused would depend on where the graph is cut.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # memory is given back
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
    content = model if isinstance(model, str) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of its errors are private
        raise ValueError(f"onnxruntime cannot run {label}: {error}") from error


class Segment:
    """Float operators that run together. The session is made at the first call, when the types of its inputs are known.

    Args:
        file: The graph that they belong to.
        nodes: The operators, in order.
        wanted: The tensors that are read outside.
    """

    def __init__(self, file: GraphFile, nodes: Sequence[NodeProto], wanted: Iterable[str]) -> None:
        self._file = file
        self._nodes = nodes
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in read_by(node) if name not in made)
        self._fixed = [name for name in read if file.needs(name) is not None]
        self.reads = [name for name in read if name not in self._fixed]
        self.makes = [name for name in dict.fromkeys(wanted) if name in made]
        self._session: Any = None

    def run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Compute the tensors that are read outside.

        Args:
            arrays: What the operators read, and maybe more.

        Raises:
            ValueError: If an operator cannot be computed; the message of onnxruntime names it.
        """
        if not self.makes:
            return {}
        given = {name: arrays[name] for name in self.reads}
        if self._session is None:
            self._session = session(self._model(given), f"the float operators of {self._file.label}")
        try:
            found = self._session.run(self.makes, given)
        except Exception as error:  # the classes of its errors are private
            raise ValueError(f"The float operators of {self._file.label} cannot be computed: {error}") from error
        return dict(zip(self.makes, map(np.asarray, found), strict=True))  # numbers without axes come bare

    def _model(self, given: Arrays) -> ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in given.items()
        ]
        graph = helper.make_graph(
            [],
            "segment",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in self.makes],
            [tensor for name in self._fixed if (tensor := self._file.needs(name)) is not None],
        )
        graph.node.extend(self._nodes)
        whole = self._file.model
        own = [function for function in whole.functions if not function.name.startswith(("Ascend", "Basic"))]
        return helper.make_model(graph, ir_version=whole.ir_version, opset_imports=whole.opset_import, functions=own)


def check_inputs(file: GraphFile, inputs: Arrays) -> dict[str, np.ndarray]:
    """Return the inputs of a graph in its types, if they are its.

    Args:
        file: The graph.
        inputs: Input name -> numbers.

    Raises:
        ValueError: If names, types or shapes are not those of the graph.
    """
    expected = {name: _shape(kind) for name, kind in file.inputs.items()}
    if set(inputs) != set(expected):
        raise ValueError(
            f"{file.label} has the inputs {', '.join(map(repr, expected))}; given were "
            f"{', '.join(map(repr, inputs)) or 'none'}."
        )
    found = {}
    for name, shape in expected.items():
        array = np.asarray(inputs[name])
        fits = len(shape) == array.ndim and all(
            not isinstance(wanted, int) or wanted == length for wanted, length in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Input '{name}' of {file.label} has the shape {list(shape)} and was given {list(array.shape)}. Give "
                "batches of that shape (drop_last=True leaves out the shorter last one), or export with dynamic_axes."
            )
        dtype = helper.tensor_dtype_to_np_dtype(file.inputs[name].tensor_type.elem_type)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ValueError(f"Input '{name}' of {file.label} holds {dtype} numbers and was given {array.dtype}.")
        found[name] = np.ascontiguousarray(array, dtype=dtype)
    return found


def _shape(kind: onnx.TypeProto) -> list[int | str]:
    dims = kind.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?") for dim in dims]
