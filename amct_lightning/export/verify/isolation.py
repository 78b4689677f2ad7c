"""One layer of a file, given the very input that the layer of the model had."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amct_lightning.export.integer.compute import layer_outputs, recurrent_outputs
from amct_lightning.export.integer.units import InputQuantizer, IntegerLayer, RecurrentLayer, Unit
from amct_lightning.export.verify.expected import ExpectedLayer, Product
from amct_lightning.export.verify.torch_side import Call, near_a_tie, torch_codes
from amct_lightning.quantizers import ActivationQuantizer

_KEPT_BY_THE_DEVICE = 1.001 * 2.0**-10
"""By which part of what is left, at most, cutting a scale to 19 bits makes it smaller."""

_SUM_ERRORS = 8.0
"""Rounding errors of a float sum, in units of eps times the sum of its terms' magnitudes; in practice well below 1."""

_MOST_STEPS = 32


class _Codes:
    """The codes of a tensor.

    Args:
        quantizer: What makes them in the model.
        on_grid: Whether the model computes with what the device computes with.
        x: The tensor.
        scale: The scale in the record, that of the quantizer or that rounded to float16.
        offset: The offset in the record.
        bits: Bits of the codes.

    Attributes:
        x: The tensor.
        scale: The scale in the record.
        offset: The offset in the record.
        wanted: The codes by the record's factors.
        trained: The codes by the quantizer, which training and the model know, moved to the offset in the record.
        error: By which part the record's scale differs from the quantizer's.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, on_grid: bool, x: Tensor, scale: float, offset: int, bits: int
    ) -> None:
        self.x, self.scale, self.offset = x, scale, offset
        own, shift = float(quantizer.scale), offset - int(quantizer.offset)
        self.trained = torch_codes(quantizer, x, on_grid) + shift
        self.error = abs(scale / own - 1.0)
        half = 2.0 ** (bits - 1)
        same = np.float32(scale) == np.float32(own) and not shift
        self.wanted = (
            self.trained if same else (torch.round(x / np.float32(scale).item() + offset)).clamp(-half, half - 1)
        )


@dataclass
class Isolated:
    """What came of a layer alone.

    Attributes:
        codes: How many codes were compared.
        ties: How many differ because the value is at a tie of rounding.
        wrong: How many differ otherwise.
        outputs: How many outputs were compared.
        outputs_wrong: How many differ by more than rounding.
        largest: The largest difference of an output.
    """

    codes: int = 0
    ties: int = 0
    wrong: int = 0
    outputs: int = 0
    outputs_wrong: int = 0
    largest: float = 0.0

    def add_codes(self, found: Tensor, expected: _Codes, first: int | None = None) -> None:
        """Count codes that differ, by one at a tie as rounding; of all or the first along the first axis."""
        x, wanted = expected.x[:first], expected.wanted[:first]
        places = found != wanted
        near = near_a_tie(x[places], expected.scale, expected.offset)
        ties = int(((found[places] - wanted[places]).abs().eq(1) & near).sum())
        self.codes += wanted.numel()
        self.ties += ties
        self.wrong += int(places.sum()) - ties

    def add_outputs(self, found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
        """Count outputs that differ by more than a tolerance."""
        difference = (found - expected).abs()
        self.outputs += expected.numel()
        self.outputs_wrong += int((~(difference <= tolerance)).sum())
        self.largest = float(np.maximum(self.largest, float(difference.max()) if difference.numel() else 0.0))


def isolated(unit: Unit, expected: ExpectedLayer, call: Call, deq_bits: int) -> Isolated:
    """Compare a layer of a file with that of the model, on the input that the latter had.

    The codes are made of that input by the file's quantizer. They may differ by one where the value is within a few
    float32 roundings of a tie, because the device multiplies by a reciprocal where training divides. The outputs are
    computed from the *model's* codes, so that a tie is not counted again. They may differ by what is known of the
    export: half a unit of the integer sums for the rounded bias, 2**-10 of the value where the device keeps 19 bits of
    the scale, the integers of the weight that folding a BatchNorm has rounded otherwise, the rounding of float sums,
    and that of the input's scale to float16 where the configuration asks for it.

    Args:
        unit: The layer of the file.
        expected: The layer of the model.
        call: What that had and gave.
        deq_bits: How many bits of the dequantization scale count.

    Raises:
        ValueError: If the layer cannot be computed with that input.
    """
    result = Isolated()
    record = expected.record
    module = expected.module
    factors = *record.input_factors, expected.bits
    codes = _Codes(module.input_quantizer, module.deploy_grid, call.x, *factors)
    result.add_codes(unit.quantizer.codes(call.x), codes)
    if isinstance(unit, IntegerLayer):
        _product_outputs(result, unit, expected.input, call, codes, deq_bits)
    elif expected.hidden is not None:
        _recurrent_outputs(result, unit, expected, call, codes, deq_bits)
    return result


def _product_outputs(
    result: Isolated, unit: IntegerLayer, expected: Product, call: Call, given: _Codes, deq_bits: int
) -> None:
    codes = given.trained
    shaped = codes.flatten(0, -2) if unit.kind == "Gemm" and codes.dim() != 2 else codes
    _, (before, after) = layer_outputs(unit, shaped, deq_bits)
    found = before if expected.float_bias is None else after
    if found.numel() != call.y.numel() or (found.dim() == call.y.dim() and found.shape != call.y.shape):
        raise ValueError(f"its output has shape {list(found.shape)} instead of {list(call.y.shape)}")
    largest = float((codes - unit.quantizer.offset).abs().max()) if codes.numel() else 0.0
    rows = np.abs(expected.codes.astype(np.int16))
    # Of a transposed convolution these are sums per input channel, which is near enough for a bound of rounding.
    per_channel = rows.reshape(rows.shape[0], -1).sum(1, dtype=np.int64).max() * largest
    scale = float(expected.scale.max())
    bias = 0.0 if expected.float_bias is None else float(np.abs(expected.float_bias).max())
    fixed = _SUM_ERRORS * call.eps * (per_channel * scale + bias)
    fixed += (0.5 if unit.bias is not None else 0.0) * scale + float(expected.flips.max()) * largest * scale
    magnitude = before.reshape(call.y.shape).abs()
    # The dropped bits take their part of sums and bias together; another scale of the input that of the sums alone.
    tolerance = fixed + (_KEPT_BY_THE_DEVICE if deq_bits != 32 else 0.0) * magnitude + given.error * (magnitude + bias)
    result.add_outputs(found.reshape(call.y.shape), call.y, tolerance)


def _recurrent_outputs(
    result: Isolated, unit: RecurrentLayer, expected: ExpectedLayer, call: Call, given: _Codes, deq_bits: int
) -> None:
    """Compare the steps of a recurrent layer, each begun with the hidden state that the model had."""
    record = expected.record
    scale_h, offset_h = record.scale_h or 1.0, record.offset_h or 0
    hidden = torch.cat((call.state[0], call.y))[: len(call.y)]
    quantizer = expected.module.get_quantizer("hidden_quantizer")
    own = _Codes(quantizer, expected.module.deploy_grid, hidden, scale_h, offset_h, expected.bits)
    if unit.scale.size == 0:  # computed in float, with hidden states that are not quantized
        result.add_codes(unit.hidden_quantizer.codes(hidden[:1]), own, 1)
        return
    trace, (y, _, _) = recurrent_outputs(unit, call.x, call.state, deq_bits, codes=given.trained, hidden=hidden)
    assert trace.hidden_codes is not None
    result.add_codes(trace.hidden_codes.float(), own)
    gates = float(trace.sums.abs().max()) * float(unit.scale.max()) + 1.0
    part = (_KEPT_BY_THE_DEVICE if deq_bits != 32 else _SUM_ERRORS * call.eps) + given.error + own.error
    error = part * gates
    flipped = bool((trace.hidden_codes != own.trained).any())
    step = float(scale_h) * _largest_weight(expected.hidden) if flipped else 0.0
    half = 0.5 * float(unit.scale.max())
    tolerance = (error + 2 * half + step) * min(len(call.y) + 1, _MOST_STEPS)
    result.add_outputs(y.squeeze(1), call.y, torch.full_like(call.y, tolerance))


def _largest_weight(product: Product | None) -> float:
    if product is None:
        return 0.0
    return float(np.abs(product.codes).max() * product.weight_scale.max())


def same_input(found: np.ndarray, call: Call, quantizer: InputQuantizer) -> float:
    """Return how far an input that a file computes is from that of the model, as a part of the largest magnitude.

    Args:
        found: The input that the file computes from the model's outputs of the layers before.
        call: What the layer of the model had.
        quantizer: What reads it.

    Raises:
        ValueError: If it has another shape.
    """
    wanted = call.x
    array = torch.from_numpy(np.ascontiguousarray(found)).float()
    flattened = array.dim() != wanted.dim() and array.shape[-1:] == wanted.shape[-1:]
    if array.shape != wanted.shape and not (flattened and array.numel() == wanted.numel()):
        raise ValueError(f"'{quantizer.source}' has shape {list(array.shape)} instead of {list(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    array = array.reshape(wanted.shape)
    difference = torch.where(array == wanted, 0.0, (array - wanted).abs())
    return float(difference.nan_to_num(torch.inf).max() / wanted.abs().max().clamp(min=1e-30))
