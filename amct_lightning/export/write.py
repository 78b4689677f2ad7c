"""Writing exported networks to disk: all of them or none, and none that a checker refuses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir import external_data

from amct_lightning.files import atomic_path, location, write_bytes

VENDOR_OPERATORS = frozenset(
    {"AscendQuant", "AscendDequant", "BasicLSTMInplaceFillWindowCache", "BasicGRUInplaceFillWindowCache"}
)
"""Operators of the Ascend compiler. They stand in ONNX's own domain, where its parser looks for them."""

_CHECKED_DOMAIN = "ascend"
_LARGE_TENSOR = 1024  # bytes; smaller ones stay in the file


def save_models(models: Mapping[str, ir.Model], external_data_threshold: int) -> None:
    """Write networks to files; if one cannot be written, no file is changed.

    Args:
        models: Path -> network.
        external_data_threshold: Networks whose constants take more bytes have them in a file of their own beside them,
            ``<path>.data``.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If a network with a file of constants is to go to a remote place.
    """
    with ExitStack() as stack:
        remote: dict[str, bytes] = {}
        for path, model in models.items():
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
                content = _serialized(model, checked=not large)
                stack.enter_context(atomic_path(place)).write_bytes(content)
            else:
                remote[path] = _serialized(model)
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
            node.domain = ""
        if vendor:
            model.opset_import.pop()


def _size(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _serialized(model: ir.Model, checked: bool = True) -> bytes:
    proto = ir.to_proto(model)
    if checked:
        check_network(proto)
    content: bytes = proto.SerializeToString()
    return content


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
