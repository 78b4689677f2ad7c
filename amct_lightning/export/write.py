"""Writing exported networks to disk: all of them or none, and none that a checker refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir import external_data

from amct_lightning.export.forms.versions import weights_taken_out
from amct_lightning.files import atomic_path, location, write_bytes

VENDOR_OPERATORS = frozenset(
    {"AscendQuant", "AscendDequant", "BasicLSTMInplaceFillWindowCache", "BasicGRUInplaceFillWindowCache"}
)
"""Operators of the Ascend compiler. They stand in ONNX's own domain, where its parser looks for them."""

_CHECKED_DOMAIN = "ascend"
_LARGE_TENSOR = 1024  # bytes; smaller ones stay in the file
_GRAPH, _INITIALIZER = b"\x3a", b"\x2a"  # fields 7 of a model and 5 of a graph, which hold messages


def save_models(models: Iterable[tuple[str, ir.Model]], external_data_threshold: int) -> None:
    """Write networks to files; if one cannot be written, no file is changed.

    Args:
        models: Paths and networks; one is made after the other, so that they need not be in memory together.
        external_data_threshold: Networks whose constants take more bytes have them in a file of their own beside them,
            ``<path>.data``.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If a network with a file of constants is to go to a remote place.
    """
    with ExitStack() as stack:
        remote: dict[str, bytes] = {}
        for path, model in models:
            place = location(path)
            large = _size(model) > external_data_threshold
            if large and isinstance(place, str):
                raise ValueError(
                    f"'{path}' is on a remote file system, and the constants of the network take more than "
                    f"{external_data_threshold} bytes, which need a file of their own. Export to a local folder and "
                    "copy both files."
                )
            if isinstance(place, Path):
                if place.is_dir():
                    raise IsADirectoryError(f"'{path}' is a folder; give the path of the file to write.")
                if large:
                    _write_constants(model, place, stack)
                with stack.enter_context(atomic_path(place)).open("wb") as file:
                    file.writelines(serialized(model))
            else:
                remote[path] = b"".join(serialized(model))
        for path, content in remote.items():
            write_bytes(path, content)


def check_network(model: onnx.ModelProto) -> None:
    """Run ONNX's checker on a network that may have operators of the Ascend compiler.

    Args:
        model: The network.

    Raises:
        onnx.checker.ValidationError: If it is not valid.

    Example:
        >>> node = onnx.helper.make_node("AscendQuant", ["x"], ["y"], scale=2.0, offset=0.0, dst_type="INT8")
        >>> x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        >>> y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, [1])
        >>> graph = onnx.helper.make_graph([node], "network", [x], [y])
        >>> check_network(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)]))
    """
    vendor = [node for node in model.graph.node if node.op_type in VENDOR_OPERATORS and not node.domain]
    for node in vendor:
        node.domain = _CHECKED_DOMAIN
    if vendor:
        model.opset_import.append(onnx.helper.make_opsetid(_CHECKED_DOMAIN, 1))
    try:
        onnx.checker.check_model(model, full_check=not vendor)
    finally:
        for node in vendor:
            node.ClearField("domain")
        if vendor:
            model.opset_import.pop()


def check_graph(model: ir.Model) -> None:
    """Run ONNX's checker on a network, with its weights as inputs, as it makes two copies of what it checks.

    Args:
        model: The network.

    Raises:
        onnx.checker.ValidationError: If it is not valid.
    """
    light = model.clone()
    weights_taken_out(light)
    check_network(ir.to_proto(light))


def _size(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def serialized(model: ir.Model) -> Iterator[bytes]:
    """Yield what a file holds piece by piece, as protobuf makes two copies of what it writes as a whole.

    A message is a sequence of fields, in any order; the weights are the last ones of the graph, and that of the model.

    Args:
        model: The network.

    Raises:
        onnx.checker.ValidationError: If it is not valid.
    """
    light = model.clone()
    weights = weights_taken_out(light)
    proto = ir.to_proto(light)
    check_network(proto)  # with the weights as inputs
    del proto.graph.input[len(proto.graph.input) - len(weights) :]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = [len(_tensor(name, weight)) for name, weight in weights.items()]
    fields = [_INITIALIZER + _varint(size) for size in sizes]
    total = len(graph) + sum(map(len, fields)) + sum(sizes)
    yield proto.SerializeToString() + _GRAPH + _varint(total)
    yield graph
    for field, (name, weight) in zip(fields, weights.items(), strict=True):
        yield field
        yield _tensor(name, weight)


def _tensor(name: str, tensor: ir.TensorProtocol) -> bytes:
    proto = ir.to_proto(tensor)
    proto.name = name
    content: bytes = proto.SerializeToString()
    return content


def _varint(number: int) -> bytes:
    """Write a length as protobuf does: seven bits to a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _write_constants(model: ir.Model, place: Path, stack: ExitStack) -> None:
    """Write the large constants of a network beside it, and let the network refer to them."""
    final = place.with_name(f"{place.name}.data")
    temporary = stack.enter_context(atomic_path(final))
    values = [v for v in model.graph.initializers.values() if v.const_value and v.const_value.nbytes > _LARGE_TENSOR]
    tensors = [value.const_value for value in values if value.const_value is not None]
    written = external_data.convert_tensors_to_external(tensors, temporary.parent, temporary.name)
    for value, tensor in zip(values, written, strict=True):
        value.const_value = ir.ExternalTensor(
            final.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=str(tensor.name),
            base_dir=final.parent,
        )
