"""Computing one quantized layer as the device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

from amct_lightning.export.integer.arithmetic import (
    convolution_sums,
    dequantize,
    int32_sums,
    kept_bits,
    matmul_sums,
)
from amct_lightning.export.integer.graph_file import attributes_of, named
from amct_lightning.export.integer.units import IntegerLayer, LayerTrace, RecurrentLayer, as_tensor

Observe = Callable[[LayerTrace], None]
"""Is given what every quantized layer computed, in order of execution."""


def layer_outputs(
    layer: IntegerLayer, codes: Tensor, bits: int = 19, dtype: torch.dtype = torch.float32
) -> tuple[LayerTrace, tuple[Tensor, Tensor]]:
    """Compute a layer from the codes of its input.

    Args:
        layer: The layer.
        codes: The codes, integers in float32.
        bits: How many bits of the dequantization scale count, 19 or 32.
        dtype: What the device puts out, float32 or float16.

    Returns:
        What it computed; its output before and after a bias that is added as a float.

    Raises:
        ValueError: If the layer's numbers do not fit its input.
    """
    moved = _moved(layer.moves_codes, codes)
    if layer.kind == "MatMul" and layer.scale.size > layer.weight.shape[-1]:
        return _outputs_of_groups(layer, codes, moved - layer.quantizer.offset)
    try:
        sums = _sums(layer, moved - layer.quantizer.offset)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"Layer '{layer.name}' ({layer.kind}) cannot be computed: its input of shape {list(moved.shape)} does not "
            f"fit its weight of shape {list(layer.weight.shape)} ({error})."
        ) from error
    bias = None if layer.bias is None else _along_channels(as_tensor(layer.bias), layer, sums.dim())
    wrapped, overflows = int32_sums(sums, bias)
    wrapped = _moved(layer.moves_sums, wrapped)
    scale = _along_channels(as_tensor(kept_bits(layer.scale, bits)), layer, sums.dim())
    result = dequantize(wrapped, scale, dtype)
    output = result if layer.float_bias is None else result + as_tensor(layer.float_bias)
    return LayerTrace(layer.name, codes.int(), wrapped, output, overflows), (result, output)


def _outputs_of_groups(layer: IntegerLayer, codes: Tensor, x: Tensor) -> tuple[LayerTrace, tuple[Tensor, Tensor]]:
    """Compute a product whose weight has a scale per group of inputs: integer sums in groups, float sums of groups."""
    weight, outputs = as_tensor(layer.unpacked(x.shape[-1])), layer.weight.shape[-1]
    scale = as_tensor(layer.scale).view(outputs, -1).T
    parts = zip(x.chunk(len(scale), -1), weight.chunk(len(scale)), strict=True)
    sums, overflows = int32_sums(torch.stack([matmul_sums(*part) for part in parts], -2))
    result = (sums.float() * scale).sum(-2)
    output = result if layer.float_bias is None else result + as_tensor(layer.float_bias)
    return LayerTrace(layer.name, codes.int(), sums, output, overflows), (result, output)


def recurrent_outputs(
    layer: RecurrentLayer,
    x: Tensor,
    state: Sequence[Tensor | None],
    bits: int = 19,
    dtype: torch.dtype = torch.float32,
    *,
    codes: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[LayerTrace, tuple[Tensor, ...]]:
    """Compute an LSTM or GRU.

    Both have the sums of the sequence and of the hidden state dequantized apart, and the gates in float32. The cell
    state of an LSTM is not quantized; the new state of a GRU mixes in the *quantized* old one, as in training.

    Args:
        layer: The layer.
        x: The sequence, (time, batch, features).
        state: Initial hidden and, for an LSTM, cell state, (1, batch, hidden); ``None`` for zeros.
        bits: How many bits of the dequantization scale count, 19 or 32.
        dtype: What the device puts out, float32 or float16.
        codes: Codes of the sequence, to be taken instead of those of ``x``.
        hidden: The hidden state at the beginning of every step (time, batch, hidden), to be taken instead of what the
            step before gives.

    Returns:
        What it computed; the outputs of all steps (time, 1, batch, hidden) and the last states (1, batch, hidden).
    """
    if x.dim() != 3:
        raise ValueError(f"The input of layer '{layer.name}' ({layer.kind}) has shape {list(x.shape)}, not three axes.")
    codes = layer.quantizer.codes(x) if codes is None else codes
    steps = _Steps(layer, x.shape[2], bits, dtype)
    gates, sums, overflows = steps.products(codes - layer.quantizer.offset, hidden=False)
    zeros = x.new_zeros(x.shape[1], layer.hidden_size)
    h, c = (zeros if part is None else part.reshape(zeros.shape) for part in (*state, None)[:2])
    outputs, hidden_codes = [], []
    for step in range(x.shape[0]):
        h = h if hidden is None else hidden[step]
        code = layer.hidden_quantizer.codes(h)
        hidden_codes.append(code.int())
        recurrent, _, more = steps.products(code - layer.hidden_quantizer.offset, hidden=True)
        overflows += more
        h, c = steps.cell(gates[step], recurrent, (code - layer.hidden_quantizer.offset) * steps.hidden_step, c)
        outputs.append(h)
    y = torch.stack(outputs) if outputs else x.new_zeros(0, *zeros.shape)
    trace = LayerTrace(layer.name, codes.int(), sums, y, overflows, torch.stack(hidden_codes) if hidden_codes else None)
    return trace, (y.unsqueeze(1), h.unsqueeze(0), c.unsqueeze(0))


class _Steps:
    """The numbers of a recurrent layer, ready for its steps."""

    def __init__(self, layer: RecurrentLayer, inputs: int, bits: int, dtype: torch.dtype) -> None:
        self.kind, self.dtype = layer.kind, dtype
        rows = layer.weight.shape[1]
        self.weights = [as_tensor(weight).T for weight in layer.unpacked(inputs)]
        bias = np.zeros(2 * rows, np.int64) if layer.bias is None else layer.bias
        self.biases = as_tensor(bias).view(2, rows)
        scale = as_tensor(kept_bits(layer.scale, bits)).view(2, -1)
        self.scales = scale.repeat_interleave(rows // scale.shape[1], 1)
        self.hidden_step = float(np.float32(1) / np.float32(layer.hidden_quantizer.factor))

    def products(self, codes: Tensor, hidden: bool) -> tuple[Tensor, Tensor, int]:
        """Return the gates' part of codes less their offset, its int32 sums and their overflows."""
        sums, overflows = int32_sums(matmul_sums(codes, self.weights[hidden]), self.biases[int(hidden)])
        return dequantize(sums, self.scales[int(hidden)], self.dtype), sums, overflows

    def cell(self, x: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next hidden and cell state; gates in ONNX's order."""
        if self.kind == "LSTM":
            i, o, f, g = (x + recurrent).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        z, r, n = x.chunk(3, -1)
        z_h, r_h, n_h = recurrent.chunk(3, -1)
        new = (n + (r + r_h).sigmoid() * n_h).tanh()
        return new + (z + z_h).sigmoid() * (h - new), c


def _sums(layer: IntegerLayer, x: Tensor) -> Tensor:
    if layer.kind in ("Conv", "ConvTranspose"):
        weight = as_tensor(layer.unpacked(x.shape[1]))
        return convolution_sums(layer.kind, x, weight, dict(layer.attributes))
    if layer.kind == "Gemm" and layer.attributes.get("transA"):
        x = x.T
    weight = as_tensor(layer.unpacked(x.shape[-1]))
    return matmul_sums(x, weight.T if layer.kind == "Gemm" and layer.attributes.get("transB") else weight)


def _along_channels(values: Tensor, layer: IntegerLayer, dims: int) -> Tensor:
    """Shape numbers per output channel so that they broadcast over the sums."""
    if layer.kind in ("Conv", "ConvTranspose"):
        return values.view(-1, *[1] * (dims - 2))
    return values


def _moved(nodes: Sequence[NodeProto], tensor: Tensor) -> Tensor:
    """Do what the Transpose nodes beside a layer do."""
    for node in nodes:
        order = attributes_of(node).get("perm") or list(reversed(range(tensor.dim())))
        if len(order) != tensor.dim():
            raise ValueError(f"Node {named(node)} orders {len(order)} axes and gets the shape {list(tensor.shape)}.")
        tensor = tensor.permute(*order)
    return tensor
