"""Reading the quantized layers out of the two forms that onnxruntime runs: fake-quant and QDQ."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from amct_lightning.export.integer.deploy_form import PRODUCTS, DeployReader, FormReader
from amct_lightning.export.integer.graph_file import GraphFile, attributes_of
from amct_lightning.export.integer.units import InputQuantizer, IntegerLayer, RecurrentLayer

_RECURRENT = ("LSTM", "GRU")
_CODES = ("Sub", "Clip", "Add", "Round", "Mul")  # from the last to the first


def reader_of(form: str, file: GraphFile) -> FormReader:
    """Return the reader of a form, which has read a file.

    Args:
        form: ``"deploy"``, ``"fake_quant"`` or ``"qdq"``.
        file: The graph of the file.

    Raises:
        ValueError: If the file has something in it that the form has not.
    """
    kinds: dict[str, Callable[[GraphFile], FormReader]] = {
        "deploy": DeployReader,
        "fake_quant": FakeQuantReader,
        "qdq": QdqReader,
    }
    reader = kinds[form](file)
    reader.read()
    return reader


class _FloatFormReader(FormReader):
    """What both forms have in common: LSTM and GRU are ONNX's own, and compute in float."""

    def read(self) -> None:
        """Find the quantized layers.

        Raises:
            ValueError: If a node is not what such a model has there.
        """
        for node in self.file.nodes:
            if node.op_type in PRODUCTS and (layer := self.layer(node)) is not None:
                self.units.append(layer)
            elif node.op_type in _RECURRENT and (recurrent := self._recurrent(node)) is not None:
                self.units.append(recurrent)

    def _recurrent(self, node: NodeProto) -> RecurrentLayer | None:
        x, w, r, b, _, h, c = (*node.input, "", "", "", "")[:7]
        quantizer, hidden = self.fake_quantizer(x), self.fake_quantizer(h)
        if quantizer is None:
            return None
        if hidden is None:
            raise self.unknown(node, "its sequence is quantized and its initial hidden state is not")
        self.take(node)
        return RecurrentLayer(
            node.name,
            node.op_type,
            quantizer,
            hidden,
            self.floats(w, node, "weight"),
            self.floats(r, node, "recurrent weight"),
            self.floats(b, node, "bias") if b else None,
            np.ones(0, np.float32),
            c,
            (*node.output, "", "")[:3],
            attributes_of(node),
        )

    @abstractmethod
    def fake_quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what quantizes and dequantizes a tensor, ``None`` if nothing does."""

    def floats(self, tensor: str, node: NodeProto, what: str) -> np.ndarray:
        """Return the fixed float numbers that a node reads, dequantized where they stand there as integers."""
        return self.need(tensor, node, what)


class FakeQuantReader(_FloatFormReader):
    """Reads a fake-quant model, whose layers compute with integers in float."""

    def quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what the nodes ``<layer>.quant.fakequant.*`` do."""
        nodes: list[NodeProto] = []
        for kind in _CODES:
            node = self.file.maker(tensor)
            if node is None or node.op_type != kind:
                return None
            nodes.insert(0, node)
            tensor = node.input[0]
        scale, offset, low, high, again = (
            self.file.constant(name)
            for name in (nodes[0].input[1], nodes[2].input[1], *nodes[3].input[1:3], nodes[4].input[1])
        )
        if scale is None or offset is None or low is None or high is None or again is None or scale.size != 1:
            return None
        bits = math.log2(float(high) - float(low) + 1)
        if bits not in (4, 8, 16) or float(offset) != float(again):
            found = f"{float(low):g} and {float(high):g}, with offset {float(offset):g}"
            raise self.unknown(nodes[3], f"it clips to {found}")
        self.take(*nodes)
        name = nodes[0].name.removesuffix(".fakequant.mul")
        return InputQuantizer(name, tensor, float(scale.item()), float(offset), int(bits))

    def fake_quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what makes the codes that a node ``<layer>.anti_quant*`` multiplies by their scale."""
        node = self.file.maker(tensor)
        found = None if node is None or node.op_type != "Mul" else self.quantizer(node.input[0])
        if node is None or found is None:
            return None
        scale = float(self.need(node.input[1], node, "scale"))
        if not math.isclose(scale * found.factor, 1.0, rel_tol=1e-6):
            raise self.unknown(node, f"it multiplies by {scale:g}, '{found.name}' before it by {found.factor:g}")
        self.take(node)
        return found

    def is_dequant(self, node: NodeProto) -> bool:
        """Tell whether a node multiplies sums by their scales."""
        return node.op_type == "Mul" and self.file.constant(node.input[1]) is not None

    def scale(self, last: NodeProto, quantizer: InputQuantizer) -> tuple[np.ndarray, None]:
        """Return the scales by which a node multiplies sums."""
        return self.need(last.input[1], last, "scale").astype(np.float32).ravel(), None


class QdqReader(_FloatFormReader):
    """Reads a model with QuantizeLinear and DequantizeLinear, whose layers compute in float with what these give."""

    def quantizer(self, tensor: str) -> InputQuantizer | None:
        """Return what a QuantizeLinear before a DequantizeLinear does."""
        after = self.file.maker(tensor)
        if after is None or after.op_type != "DequantizeLinear":
            return None
        node = self.file.maker(after.input[0])
        if node is None or node.op_type != "QuantizeLinear":
            return None
        scale, zero = self._factors(node)
        again = self._factors(after)
        if scale.size != 1 or not (np.array_equal(scale, again[0]) and np.array_equal(zero, again[1])):
            raise self.unknown(after, f"its factors are not those of '{node.name}'")
        bits = {"int4": 4, "int8": 8, "int16": 16}.get(zero.dtype.name)
        if bits is None:
            raise self.unknown(node, f"its codes are {zero.dtype}")
        self.take(node, after)
        return InputQuantizer(node.name, node.input[0], float(scale.item()), float(zero.item()), bits, divides=True)

    fake_quantizer = quantizer

    def layer(self, node: NodeProto) -> IntegerLayer | None:
        """Return the quantized layer that a convolution or product is, ``None`` if it is one in float."""
        found = super().layer(node)
        maker = self._constant_dequant(node.input[2]) if len(node.input) > 2 else None
        if found is None or maker is None:
            return found
        scale = self._factors(maker)[0].ravel()
        if scale.size in (1, found.scale.size) and np.allclose(scale, found.scale, 1e-6, 0.0):
            return found
        return replace(found, faults=("the scale of its bias is not that of its sums, input times weight",))

    def integers(self, tensor: str, node: NodeProto, what: str) -> np.ndarray:
        """Return the integers of which a DequantizeLinear makes a weight or bias.

        Raises:
            ValueError: If there are none, or with an offset.
        """
        maker = self._constant_dequant(tensor)
        if maker is None:
            raise self.unknown(node, f"no DequantizeLinear makes its {what} '{tensor}' of integers")
        if self._factors(maker)[1].astype(np.int64).any():
            raise self.unknown(maker, "its zero point is not 0")
        self.take(maker)
        codes = super().integers(maker.input[0], maker, what)
        for move in self._moves(tensor)[1]:
            self.take(move)
            codes = (
                codes.transpose(attributes_of(move)["perm"])
                if move.op_type == "Transpose"
                else self._shaped(codes, move)
            )
        return codes

    def fixed(self, tensor: str) -> np.ndarray | None:
        """Return the fixed numbers that a tensor has, dequantized where they stand in the file as integers."""
        maker = self._constant_dequant(tensor)
        if maker is None:
            return self.file.constant(tensor)
        codes = self.integers(tensor, maker, "bias")
        scale = self._factors(maker)[0]
        shape = [1] * codes.ndim
        if scale.size > 1:
            shape[int(attributes_of(maker).get("axis", 1))] = -1
        dequantized: np.ndarray = codes.astype(np.float32) * scale.reshape(shape)
        return dequantized

    def floats(self, tensor: str, node: NodeProto, what: str) -> np.ndarray:
        """Return the float numbers of a weight or bias, dequantized where it stands there as integers."""
        found = self.fixed(tensor)
        return self.need(tensor, node, what) if found is None else found

    def is_dequant(self, node: NodeProto) -> bool:
        """Tell that no node dequantizes sums: those of such a layer are real numbers."""
        return False

    def to_dequant(self, node: NodeProto) -> tuple[list[NodeProto], None]:
        """Return nothing: what such a layer puts out is dequantized."""
        return [], None

    def scale(self, last: NodeProto, quantizer: InputQuantizer) -> tuple[np.ndarray, None]:
        """Return the scale of a layer's sums, that of its weight times that of its input."""
        maker = self._constant_dequant(last.input[1])
        assert maker is not None
        scale = self._factors(maker)[0]
        # Those of groups lie as the weight does: output channels last.
        return (scale.T if scale.ndim > 1 else scale).ravel() * np.float32(quantizer.factor), None

    def _constant_dequant(self, tensor: str) -> NodeProto | None:
        maker = self.file.maker(self._moves(tensor)[0])
        is_it = maker is not None and maker.op_type == "DequantizeLinear" and self.file.maker(maker.input[0]) is None
        return maker if is_it else None

    def _moves(self, tensor: str) -> tuple[str, list[NodeProto]]:
        """Return the tensor from which another one is made by changes of its shape only, and these in order.

        The output channels of a grouped transposed convolution are on one axis of its weight only before these.
        """
        moves: list[NodeProto] = []
        while (maker := self.file.maker(tensor)) is not None and maker.op_type in ("Reshape", "Transpose"):
            moves.insert(0, maker)
            tensor = maker.input[0]
        return tensor, moves

    def _shaped(self, codes: np.ndarray, node: NodeProto) -> np.ndarray:
        return codes.reshape(self.need(node.input[1], node, "shape"))

    def _factors(self, node: NodeProto) -> tuple[np.ndarray, np.ndarray]:
        scale = self.need(node.input[1], node, "scale")
        has_zero = len(node.input) > 2 and node.input[2]
        zero = self.need(node.input[2], node, "zero point") if has_zero else np.zeros(1, np.uint8)
        return scale, zero
