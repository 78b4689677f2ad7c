"""Reading the quantized layers out of a deploy model, the form with AscendQuant and AscendDequant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import NodeProto

from amct_lightning.export.integer.arithmetic import dequant_scale
from amct_lightning.export.integer.graph_file import GraphFile, attributes_of, named
from amct_lightning.export.integer.units import InputQuantizer, IntegerLayer, RecurrentLayer, Unit

QUANT, DEQUANT = "AscendQuant", "AscendDequant"
RECURRENT = {"BasicLSTMInplaceFillWindowCache": "LSTM", "BasicGRUInplaceFillWindowCache": "GRU"}
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
_BITS_OF_RECURRENT = {2: 8, 6: 16}
_KNOWN = f"{QUANT}, {', '.join(PRODUCTS)}, {DEQUANT}, {', '.join(RECURRENT)}"


class FormReader(ABC):
    """What the readers of all forms have in common.

    Args:
        file: The graph.

    Attributes:
        file: The graph.
        units: The quantized layers in the order of the file.
        taken: The ids of the nodes that belong to them.
    """

    def __init__(self, file: GraphFile) -> None:
        self.file = file
        self.units: list[Unit] = []
        self.taken: set[int] = set()

    @abstractmethod
    def read(self) -> None:
        """Find the quantized layers.

        Raises:
            ValueError: If a node is not what such a model has there.
        """

    def take(self, *nodes: NodeProto) -> None:
        """Note that nodes belong to a quantized layer, so that no float operator runs them."""
        self.taken |= {id(node) for node in nodes}

    def need(self, tensor: str, node: NodeProto, what: str) -> np.ndarray:
        """Return the fixed numbers that a node reads.

        Raises:
            ValueError: If they are computed from the input.
        """
        found = self.file.constant(tensor)
        if found is None:
            raise self.unknown(node, f"its {what} '{tensor}' is not constant")
        return found

    def float_bias(self, node: NodeProto, tensor: str, channels: int) -> tuple[np.ndarray | None, str]:
        """Return the bias that a product without one has added to its outputs as a float, and the tensor of the sum."""
        reader = self.file.only_reader(tensor) if node.op_type == "MatMul" else None
        if reader is None or reader.op_type != "Add":
            return None, tensor
        other = next(name for name in [*reversed(reader.input)] if name != tensor)
        bias = self.fixed(other)
        if bias is None or bias.dtype != np.float32 or bias.ndim > 1 or bias.size != channels:
            return None, tensor
        self.take(reader)
        return bias, reader.output[0]

    def fixed(self, tensor: str) -> np.ndarray | None:
        """Return the fixed numbers that a tensor has, ``None`` if it is computed."""
        return self.file.constant(tensor)

    def unknown(self, node: NodeProto, why: str) -> ValueError:
        """Return the error that says that the reference cannot compute a node."""
        return ValueError(
            f"{self.file.label}: node {named(node)} is not known to the integer reference: {why}. It knows {_KNOWN} as "
            "export_onnx writes them, Transpose between them, and the operators of ONNX everywhere else."
        )

    def layer(self, node: NodeProto) -> IntegerLayer | None:
        """Return the quantized layer that a convolution or product is, ``None`` if it is one in float."""
        tensor, moves = node.input[0], list[NodeProto]()
        while (quantizer := self.quantizer(tensor)) is None:
            maker = self.file.maker(tensor)
            if maker is None or maker.op_type != "Transpose":
                return None
            moves.insert(0, maker)
            tensor = maker.input[0]
        attributes = attributes_of(node)
        _check_attributes(self, node, attributes)
        weight = self.integers(node.input[1], node, "weight")
        bias = self.integers(node.input[2], node, "bias") if len(node.input) > 2 and node.input[2] else None
        chain, added = self.to_dequant(node)
        if bias is not None and added is not None:
            raise self.unknown(node, "two biases are added to its sums")
        last = chain[-1] if chain else node
        scale, parameter = self.scale(last, quantizer)
        outputs = _channels(node, weight, attributes)
        if scale.size != 1 and (scale.size % outputs or (scale.size > outputs and parameter is not None)):
            raise self.unknown(last, f"it has {scale.size} scales for {outputs} output channels")
        self.take(node, *chain, *moves)
        float_bias, output = self.float_bias(node, last.output[0], outputs)
        return IntegerLayer(
            node.name,
            node.op_type,
            quantizer,
            weight,
            added if bias is None else bias,
            scale,
            float_bias,
            last.output[0],
            output,
            attributes,
            tuple(moves),
            tuple(step for step in chain if step.op_type == "Transpose"),
            parameter,
        )

    @abstractmethod
    def quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what makes a tensor of codes, ``None`` if the tensor holds none."""

    @abstractmethod
    def is_dequant(self, node: NodeProto) -> bool:
        """Tell whether a node that reads the sums of a layer dequantizes them."""

    @abstractmethod
    def scale(self, last: NodeProto, quantizer: InputQuantizer) -> tuple[np.ndarray, np.ndarray | None]:
        """Return by what the last node of a layer multiplies its sums, and the parameters of a deploy model for it."""

    def integers(self, tensor: str, node: NodeProto, what: str) -> np.ndarray:
        """Return fixed integers that a node reads.

        Raises:
            ValueError: If they are computed from the input, or are no integers.
        """
        found = self.need(tensor, node, what)
        if found.dtype.kind == "f" and not np.array_equal(found, np.rint(found)):
            raise self.unknown(node, f"its {what} '{tensor}' holds {found.dtype} numbers that are no integers")
        return found.astype(np.int64 if what == "bias" else np.int8)

    def to_dequant(self, node: NodeProto) -> tuple[list[NodeProto], np.ndarray | None]:
        """Return what follows a layer up to its dequantization, and the integers that are added on the way."""
        chain: list[NodeProto] = []
        added = None
        tensor = node.output[0]
        while True:
            reader = self.file.only_reader(tensor)
            if reader is None:
                raise self.unknown(node, f"its sums '{tensor}' are not read by one dequantization only")
            chain.append(reader)
            if self.is_dequant(reader):
                return chain, added
            if reader.op_type == "Add" and added is None:
                other = next((name for name in reader.input if name != tensor), tensor)
                added = self.integers(other, reader, "bias")
            elif reader.op_type != "Transpose":
                raise self.unknown(reader, f"it reads the sums of '{node.name}'")
            tensor = reader.output[0]


class DeployReader(FormReader):
    """Reads a deploy model."""

    def read(self) -> None:
        """Find the quantized layers.

        Raises:
            ValueError: If a node is not what such a model has there.
        """
        for node in self.file.nodes:
            if node.op_type == QUANT:
                self._check_readers(node)
                self.take(node)
            elif node.op_type in RECURRENT:
                self.units.append(self._recurrent(node))
            elif node.op_type in PRODUCTS and (layer := self.layer(node)) is not None:
                self.units.append(layer)
        for node in self.file.nodes:
            if id(node) not in self.taken and node.op_type.startswith("Ascend"):
                raise self.unknown(node, "no layer in integers is before it")

    def quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what an AscendQuant does."""
        node = self.file.maker(tensor)
        if node is None or node.op_type != QUANT:
            return None
        found = attributes_of(node)
        bits = _BITS.get(found.get("dst_type", "INT8"))
        if bits is None or "scale" not in found:
            raise self.unknown(node, f"its attributes are {found}")
        return InputQuantizer(node.name, node.input[0], found["scale"], found.get("offset", 0.0), bits)

    def is_dequant(self, node: NodeProto) -> bool:
        """Tell whether a node is an AscendDequant."""
        return node.op_type == DEQUANT

    def scale(self, last: NodeProto, quantizer: InputQuantizer) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and the parameters of an AscendDequant."""
        parameter = self.need(last.input[1], last, "dequantization parameter").astype(np.uint64)
        return dequant_scale(parameter, 32), parameter

    def _check_readers(self, node: NodeProto) -> None:
        for reader in self.file.readers(node.output[0]):
            if reader.op_type == "Transpose":
                self._check_readers(reader)
            elif reader.op_type not in PRODUCTS or self.file.maker(reader.input[0]) is not node:
                raise self.unknown(reader, f"it reads the codes of '{node.name}'")

    def _recurrent(self, node: NodeProto) -> RecurrentLayer:
        found, kind = attributes_of(node), RECURRENT[node.op_type]
        bits = _BITS_OF_RECURRENT.get(found.get("quant_dtype", 2))
        x, w, r, h, *rest = node.input
        cell, rest = (rest[0], rest[1:]) if kind == "LSTM" else ("", rest)
        if bits is None or len(rest) < 4:
            raise self.unknown(node, f"it has {len(node.input)} inputs and the attributes {found}")
        if found.get("direction", "forward") != "forward" or not found.get("linear_before_reset", 1):
            raise self.unknown(node, "its direction must be forward, and linear_before_reset 1")
        parameter = self.need(rest[3], node, "dequantization parameter").astype(np.uint64)
        weight = self.integers(w, node, "weight")
        if parameter.size % 2 or (2 * weight.shape[1]) % parameter.size:
            raise self.unknown(
                node, f"it has {parameter.size} dequantization parameters for 2 x {weight.shape[1]} rows"
            )
        self.take(node)
        return RecurrentLayer(
            node.name,
            kind,
            InputQuantizer(f"{node.name}.quant", x, found["quant_scale_x"], found.get("quant_offset_x", 0.0), bits),
            InputQuantizer(f"{node.name}.quant1", h, found["quant_scale_h"], found.get("quant_offset_h", 0.0), bits),
            weight,
            self.integers(r, node, "recurrent weight"),
            self.integers(rest[0], node, "bias") if rest[0] else None,
            dequant_scale(parameter, 32),
            cell,
            (*node.output, "", "")[:3],
            found,
            parameter,
        )


def _check_attributes(reader: FormReader, node: NodeProto, attributes: Mapping[str, Any]) -> None:
    """Refuse what the layers of an export never have."""
    allowed: dict[str, tuple[Any, ...]] = {"auto_pad": ("NOTSET", "VALID"), "alpha": (1.0,), "beta": (1.0,)}
    for name, values in allowed.items():
        if attributes.get(name, values[0]) not in values:
            raise reader.unknown(node, f"its {name} is {attributes[name]}")
    if attributes.get("output_shape"):
        raise reader.unknown(node, "its output_shape is given; output_padding is expected instead")


def _channels(node: NodeProto, weight: np.ndarray, attributes: Mapping[str, Any]) -> int:
    """Return the number of output channels of a layer."""
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * int(attributes.get("group", 1))
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes.get("transB")):
        return int(weight.shape[0])
    return int(weight.shape[-1])
