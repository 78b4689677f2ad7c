"""The numbers that a file holds for a layer against those that the model has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from amct_lightning.export.integer.units import InputQuantizer, IntegerLayer, RecurrentLayer, Unit
from amct_lightning.export.verify.expected import ExpectedLayer, Product
from amct_lightning.wording import cut_off

_ROUNDING = 1e-6  # relative, of a float number that was computed in another order


def static_faults(unit: Unit, expected: ExpectedLayer) -> list[str]:
    """Say what of a layer in a file is not as in the model.

    Args:
        unit: The layer in the file.
        expected: The layer in the model.

    Returns:
        One line per kind of number; none if all are equal.
    """
    record = expected.record
    faults = list(_quantizer(unit.quantizer, *record.input_factors, expected.bits, "input"))
    if isinstance(unit, RecurrentLayer):
        if expected.hidden is None:
            return [f"it is an {unit.kind} and a {type(expected.module).__name__} in the model"]
        scale_h, offset_h = record.scale_h or 1.0, record.offset_h or 0
        faults += _quantizer(unit.hidden_quantizer, scale_h, offset_h, expected.bits, "hidden state")
        faults += _recurrent(unit, expected.input, expected.hidden)
    elif expected.hidden is not None:
        return [f"it is a {unit.kind} and a {type(expected.module).__name__} in the model"]
    else:
        faults += [*unit.faults, *_product(unit, expected.input)]
    return [*faults, *_attributes(unit, expected)]


def _quantizer(found: InputQuantizer, scale: float, offset: int, bits: int, what: str) -> Iterator[str]:
    single = np.float32(scale)
    # The reciprocal in float32, or in float64 and then rounded: they differ for a few numbers.
    factors = {single} if found.divides else {np.float32(1) / single, np.float32(1 / float(single))}
    if np.float32(found.factor) not in factors:
        kind = "scale" if found.divides else "reciprocal of the scale"
        yield f"{kind} of the {what} {found.factor!r} instead of {float(min(factors))!r}"
    if found.offset != offset:
        yield f"offset of the {what} {found.offset:g} instead of {offset}"
    if found.num_bits != bits:
        yield f"codes of the {what} of {found.num_bits} bits instead of {bits}"


def _product(unit: IntegerLayer, expected: Product) -> Iterator[str]:
    flat = unit.kind == "MatMul" or (unit.kind == "Gemm" and not unit.attributes.get("transB"))
    codes = expected.codes.T if flat else expected.codes
    channels = codes.shape[unit.channel_axis]
    if unit.kind == "Conv":
        channels *= int(unit.attributes.get("group", 1))
    try:
        weight = unit.unpacked(channels)
    except ValueError as error:
        yield str(error)
    else:
        yield from _different("weight", weight, codes)
    yield from _scales(unit.scale, unit.parameter, expected.scale)
    yield from _bias(unit, expected)


def _bias(unit: IntegerLayer, expected: Product) -> Iterator[str]:
    if expected.float_bias is None:
        if unit.bias is not None and unit.bias.any():
            yield "it has a bias, which the layer of the model has not"
    elif unit.bias is not None and expected.bias is None:
        yield "its bias stands there as integers, for which a weight in groups has no scale"
    elif unit.bias is not None and expected.bias is not None:
        yield from _different("bias", unit.bias, expected.bias)
    elif unit.float_bias is not None:
        yield from _different("bias", unit.float_bias, expected.float_bias, _ROUNDING)
    elif expected.float_bias.any():
        yield "its bias is missing"


def _recurrent(unit: RecurrentLayer, first: Product, hidden: Product) -> Iterator[str]:
    rows = unit.hidden_size * (4 if unit.kind == "LSTM" else 3)
    biases = [np.zeros(rows, np.int64) if part.bias is None else part.bias for part in (first, hidden)]
    in_float = unit.weight.dtype == np.float32
    if in_float:
        scales = [_rows(part.weight_scale, rows) for part in (first, hidden)]
        weights = [part.codes * scale[:, None] for part, scale in zip((first, hidden), scales, strict=True)]
        found = [unit.weight[0], unit.recurrent[0]]
        wanted = [bias * part.scale for bias, part in zip(biases, (first, hidden), strict=True)]
    else:
        weights = [first.codes, hidden.codes]
        try:
            found = list(unit.unpacked(first.codes.shape[1]))
        except ValueError as error:
            yield str(error)
            return
        wanted = biases
        yield from _scales(unit.scale, unit.parameter, np.concatenate((first.scale, hidden.scale)))
    rounding = _ROUNDING if in_float else 0.0
    for name, one, other in zip(("weight", "recurrent weight"), found, weights, strict=True):
        yield from _different(name, one, other, rounding)
    bias = np.zeros(2 * rows) if unit.bias is None else unit.bias.ravel()
    yield from _different("bias", bias, np.concatenate(wanted), rounding)


def _rows(scale: np.ndarray, rows: int) -> np.ndarray:
    return scale.repeat(rows // scale.size)


def _scales(found: np.ndarray, parameter: np.ndarray | None, expected: np.ndarray) -> Iterator[str]:
    if parameter is None:
        longest = max(found.size, expected.size)
        yield from _different("scale of the sums", _rows(found, longest), _rows(expected, longest), _ROUNDING)
        return
    wanted = expected.view(np.uint32).astype(np.uint64)
    longest = max(parameter.size, wanted.size)
    yield from _different("dequantization parameter", _rows(parameter.ravel(), longest), _rows(wanted, longest))


def _different(what: str, found: np.ndarray, expected: np.ndarray, rounding: float = 0.0) -> Iterator[str]:
    """Say how many numbers of an array are not as expected, and show the first."""
    if found.shape != expected.shape:
        yield f"{what} of shape {list(found.shape)} instead of {list(expected.shape)}"
        return
    wrong = ~np.isclose(found, expected, rounding, rounding * _range(expected)) if rounding else found != expected
    if not wrong.any():
        return
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    values = f"{found[place].item()!r} instead of {expected[place].item()!r}"
    text = f"{what}: {int(wrong.sum())} of {wrong.size} differ, first {list(place)}: {values}"
    for one, other in combinations(range(found.ndim), 2):
        turned = expected.swapaxes(one, other)
        if turned.shape == found.shape and np.array_equal(found, turned):
            text += f"; its axes {one} and {other} are swapped"
    yield text


def _range(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _attributes(unit: Unit, expected: ExpectedLayer) -> Iterator[str]:
    if unit.kind in ("Gemm", "MatMul"):
        return
    defaults: dict[str, Any] = {"group": 1, "hidden_size": 0, "linear_before_reset": 0}
    wrong = []
    for name, value in expected.attributes.items():
        found = unit.attributes.get(name)
        if found is None:
            found = defaults.get(name, [0 if name in ("pads", "output_padding") else 1] * len(np.atleast_1d(value)))
        if found != value:
            wrong.append(f"{name} {found} instead of {value}")
    if wrong:
        yield cut_off(wrong)
