"""What a quantized layer of an ONNX file consists of, whichever form the file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

from amct_lightning.export.integer.arithmetic import quantize, unpack_int4


@dataclass(frozen=True)
class InputQuantizer:
    """What makes the codes of a layer's input.

    Attributes:
        name: Name of the node.
        source: The float tensor that it reads.
        factor: The factor as it stands in the file, a float32 number.
        offset: The code of the real value 0.
        num_bits: 4, 8 or 16.
        divides: Whether it divides by the factor, as ONNX's QuantizeLinear does, instead of multiplying.
    """

    name: str
    source: str
    factor: float
    offset: float
    num_bits: int
    divides: bool = False

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of a tensor, integers in float32.

        Raises:
            ValueError: If the tensor holds NaN, for which there is no code.
        """
        codes = quantize(x, self.factor, self.offset, self.num_bits, self.divides)
        if bool(codes.isnan().any()):
            raise ValueError(f"The input of '{self.name}' has NaN, for which there is no code.")
        return codes


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A convolution or product that is computed in integers.

    Attributes:
        name: Name of the node, which is that of the layer in the model.
        kind: Conv, ConvTranspose, Gemm or MatMul.
        quantizer: What makes the codes of its input.
        weight: The integers of the weight as the file has them: INT4 may be packed two in a byte.
        bias: The integers that are added to the sums, 1-d, if there are any.
        scale: By what the sums are multiplied, 1-d float32: one per output channel, or a single one. Where there are
            more, there is one for each group of inputs of a channel, and the products of the groups are added.
        float_bias: What is added to the outputs after that, float32, if a bias stands there as a float.
        dequantized: Name of the tensor of outputs, before ``float_bias`` is added.
        output: Name of the tensor of outputs.
        attributes: Those of the node.
        moves_codes: Transpose nodes between the quantizer and the layer.
        moves_sums: Transpose nodes between the layer and the dequantization.
        parameter: The dequantization parameters as they stand in the file, if it is a deploy model.
        faults: What does not fit together in the file itself.
    """

    name: str
    kind: str
    quantizer: InputQuantizer
    weight: np.ndarray
    bias: np.ndarray | None
    scale: np.ndarray
    float_bias: np.ndarray | None
    dequantized: str
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    moves_codes: tuple[NodeProto, ...] = ()
    moves_sums: tuple[NodeProto, ...] = ()
    parameter: np.ndarray | None = None
    faults: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the float tensors that it reads."""
        return (self.quantizer.source,)

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of the tensors that it makes."""
        return tuple(dict.fromkeys((self.dequantized, self.output)))

    @property
    def channel_axis(self) -> int:
        """The axis of the weight along which the input channels are, and two INT4 weights share a byte."""
        return 1 if self.kind == "Conv" or (self.kind == "Gemm" and self.attributes.get("transB")) else 0

    def unpacked(self, channels: int) -> np.ndarray:
        """Return the integers of the weight, those of INT4 unpacked, by the number of channels of the input.

        Args:
            channels: The number of channels of the input.

        Raises:
            ValueError: If the weight is for another number of channels.
        """
        axis = self.channel_axis
        stored = self.weight.shape[axis] * (int(self.attributes.get("group", 1)) if self.kind == "Conv" else 1)
        return _fitting(self.weight, axis, stored, channels, self.name)


@dataclass(frozen=True, eq=False)
class RecurrentLayer:
    """An LSTM or GRU of one layer and direction that is computed in integers, step by step.

    The forms that run elsewhere compute it in float: their weights and biases are float numbers, and have no scale.

    Attributes:
        name: Name of the node, which is that of the layer in the model.
        kind: LSTM or GRU.
        quantizer: What makes the codes of the sequence.
        hidden_quantizer: What makes those of the hidden state; its source is empty if the state begins with zeros.
        weight: The integers for the sequence, (1, gates * hidden, inputs), gates in ONNX's order; INT4 may be packed.
        recurrent: Those for the hidden state.
        bias: The integers added to both sums, one after the other, if there are any.
        scale: The scales of the sums of the sequence, then of the hidden state, 1-d float32.
        initial_cell: Name of the initial cell state, empty for zeros.
        outputs: Names of the tensors of all steps, the last hidden state and the last cell state; empty if not wanted.
        attributes: Those of the node.
        parameter: The dequantization parameters as they stand in the file, if it is a deploy model.
    """

    name: str
    kind: str
    quantizer: InputQuantizer
    hidden_quantizer: InputQuantizer
    weight: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray | None
    scale: np.ndarray
    initial_cell: str
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parameter: np.ndarray | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the float tensors that it reads."""
        return tuple(filter(None, (self.quantizer.source, self.hidden_quantizer.source, self.initial_cell)))

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of the tensors that it makes."""
        return tuple(filter(None, self.outputs))

    @property
    def hidden_size(self) -> int:
        """Number of values of the hidden state."""
        return int(self.weight.shape[1]) // (4 if self.kind == "LSTM" else 3)

    def unpacked(self, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers of both weights without their first axis, those of INT4 unpacked.

        Args:
            inputs: The number of features of the sequence.

        Raises:
            ValueError: If the weight is for another number of features.
        """
        weights = ((self.weight, inputs), (self.recurrent, self.hidden_size))
        found = [_fitting(weight, 2, weight.shape[2], length, self.name)[0] for weight, length in weights]
        return found[0], found[1]


Unit = IntegerLayer | RecurrentLayer
"""A quantized layer of a file."""


@dataclass(frozen=True)
class LayerTrace:
    """What a quantized layer computed.

    Attributes:
        name: Name of the layer.
        codes: Codes of its input, int32; of an LSTM or GRU of the sequence.
        sums: Its int32 sums, the bias included; of an LSTM or GRU those of the sequence.
        output: Its output, float32; of an LSTM or GRU the outputs of all steps.
        overflows: How many sums left the range of int32 and wrapped around.
        hidden_codes: Codes of the hidden state at the beginning of every step, of an LSTM or GRU.
    """

    name: str
    codes: Tensor
    sums: Tensor
    output: Tensor
    overflows: int
    hidden_codes: Tensor | None = None


def as_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; copied only where torch cannot share it."""
    return torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())


def _fitting(weight: np.ndarray, axis: int, stored: int, wanted: int, name: str) -> np.ndarray:
    if stored == wanted:
        return weight
    if stored * 2 == wanted:
        return unpack_int4(weight, axis)
    raise ValueError(
        f"The weight of layer '{name}' has {stored} input channels ({stored * 2} if two INT4 weights share a byte) "
        f"and its input {wanted}."
    )
