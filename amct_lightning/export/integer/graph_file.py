"""An ONNX file as a graph that can be asked: who makes a tensor, who reads it, which numbers are constant."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

Source = str | Path | ModelProto
"""An ONNX file, or the model that was read from one."""


LARGE = 2**26
"""From this size of a file on, in bytes, memory is spared."""


class GraphFile:
    """The graph of an ONNX file.

    Args:
        source: The file, or the model.

    Attributes:
        path: Its path, ``None`` for a model that was given.
        label: What messages call the file.
        model: The model.
        large: Whether it is a file of so many bytes that its numbers should not be in memory several times.
        nodes: Its nodes in the order of the file, Constant nodes left out.
        inputs: Name -> type of the inputs that are no initializers.
        outputs: Names of the outputs.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX file.
    """

    def __init__(self, source: Source) -> None:
        self.path = None if isinstance(source, ModelProto) else str(source)
        self.label = "the given ONNX model" if self.path is None else f"'{self.path}'"
        self.model = source if isinstance(source, ModelProto) else _load(Path(source))
        self.large = self.path is not None and self.model.ByteSize() >= LARGE
        self._arrays: dict[str, np.ndarray] = {}
        self._constants: dict[str, onnx.TensorProto | NodeProto | None] = {}
        if self.path is None:
            self._constants.update({tensor.name: tensor for tensor in self.model.graph.initializer})
        else:  # the numbers are taken out, so that those that are not needed any more can be let go of
            self._arrays = {found.name: numpy_helper.to_array(found).copy() for found in self.model.graph.initializer}
            self._constants.update(dict.fromkeys(self._arrays))
            self.model = _without_initializers(self.model)
        graph = self.model.graph
        self.inputs = {value.name: value.type for value in graph.input if value.name not in self._constants}
        self.outputs = [value.name for value in graph.output]
        self.nodes: list[NodeProto] = []
        for node in graph.node:
            if self._is_constant(node):
                self._constants[node.output[0]] = node
            else:
                self.nodes.append(node)
        self._maker = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in read_by(node):
                self._readers.setdefault(name, []).append(node)

    def maker(self, tensor: str) -> NodeProto | None:
        """Return the node that makes a tensor, ``None`` for an input or a constant."""
        return self._maker.get(tensor)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that read a tensor."""
        return self._readers.get(tensor, [])

    def only_reader(self, tensor: str) -> NodeProto | None:
        """Return the node that reads a tensor, if it is the only one and the tensor is no output of the graph."""
        readers = self.readers(tensor)
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def constant(self, tensor: str) -> np.ndarray | None:
        """Return a tensor of fixed numbers, also through Cast and Identity; ``None`` if it is computed."""
        if tensor not in self._arrays:
            found = self._constants.get(tensor)
            if found is None:
                return None
            self._arrays[tensor] = self._array(found)
        return self._arrays[tensor]

    def needs(self, tensor: str) -> onnx.TensorProto | None:
        """Return the initializer that stands for a constant tensor, ``None`` if the tensor is not constant."""
        found = self._constants.get(tensor)
        if isinstance(found, onnx.TensorProto):
            return found
        array = self.constant(tensor)
        return None if array is None else numpy_helper.from_array(array, tensor)

    def release(self, kept: Collection[str]) -> None:
        """Let go of the arrays of a file, but for some.

        Args:
            kept: Names of the constant tensors that will be needed again.
        """
        arrays = {name: self.constant(name) for name in kept}
        self._arrays = {name: array for name, array in arrays.items() if array is not None}

    def _is_constant(self, node: NodeProto) -> bool:
        if node.op_type == "Constant":
            return True
        return node.op_type in ("Cast", "Identity") and node.input[0] in self._constants

    def _array(self, found: onnx.TensorProto | NodeProto) -> np.ndarray:
        if isinstance(found, onnx.TensorProto):
            return numpy_helper.to_array(found)
        if found.op_type != "Constant":
            array = self.constant(found.input[0])
            assert array is not None
            to = attributes_of(found).get("to")
            return array if to is None else array.astype(helper.tensor_dtype_to_np_dtype(to))
        ((name, value),) = attributes_of(found).items()
        if isinstance(value, onnx.TensorProto):
            return numpy_helper.to_array(value)
        return np.array(value, dtype={"value_float": np.float32, "value_floats": np.float32}.get(name))


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node; texts as ``str``."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def read_by(node: NodeProto) -> Iterator[str]:
    """Yield the names of what a node reads, also in the graphs inside of it."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            own = {name for inner in graph.node for name in inner.output}
            own |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            yield from (name for inner in graph.node for name in read_by(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def named(node: NodeProto) -> str:
    """Return how messages name a node."""
    return f"'{node.name or node.output[0]}' ({node.op_type})"


def _without_initializers(model: ModelProto) -> ModelProto:
    """Return a model without its initializers, whose memory is free when the given one is gone."""
    del model.graph.initializer[:]
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied


def _load(path: Path) -> ModelProto:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no ONNX file '{path}'. Write it first: export_onnx(model, path, input_data, form='deploy')."
        )
    try:
        model = onnx.load(path)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ValueError(f"'{path}' cannot be read as an ONNX file: {error}.") from error
    if not model.graph.node:
        raise ValueError(f"'{path}' is no ONNX file, or one without a node.")
    return model
