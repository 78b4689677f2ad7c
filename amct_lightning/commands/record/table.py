"""Records as tables: what is in one, and where two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from amct_lightning.commands.output import new_table
from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.record.checks import OFFSET_RANGES

if TYPE_CHECKING:
    from rich.table import Table


def contents(record: QuantRecord) -> Table:
    """Return a table of the factors, one line per layer and one more for the hidden state of LSTM and GRU.

    Args:
        record: The record.
    """
    table = new_table("layer", "input", ">scale", ">offset", ">from", ">to", "weight", ">scales", ">least", ">greatest")
    shifted = any(layer.shift_bit for layer in record.values())
    if shifted:
        table.add_column("shift", justify="left")
    for name, layer in record.items():
        shift = [_shifts(layer.shift_bit)] if shifted else []
        table.add_row(name, *_line(layer, layer.scale_d, layer.offset_d, layer.scale_w), *shift)
        if layer.scale_h is not None and layer.offset_h is not None:
            table.add_row(f"{name} (hidden)", *_line(layer, layer.scale_h, layer.offset_h, layer.scale_r))
    return table


def as_plain(record: QuantRecord) -> dict[str, dict[str, Any]]:
    """Return a record as plain data: layer -> field -> value, without fields that are not given.

    Args:
        record: The record.

    Example:
        >>> as_plain(QuantRecord({"fc": LayerRecord(scale_d=0.5, offset_d=3, scale_w=[0.25], offset_w=[0])}))["fc"]
        {'scale_d': 0.5, 'offset_d': 3, 'scale_w': [0.25], 'offset_w': [0], 'act_type': 'INT8', 'wts_type': 'INT8'}
    """
    return {
        name: {field: value for field, value in asdict(layer).items() if value is not None and value != []}
        for name, layer in record.items()
    }


@dataclass(frozen=True)
class Difference:
    """Where two records differ.

    Attributes:
        layer: Name of the layer.
        field: Name of the field; empty if only one side has the layer.
        first: What the first record has.
        second: What the second record has.
        note: How many values of a list differ, and by how much.
    """

    layer: str
    field: str
    first: str
    second: str
    note: str = ""


def differences(first: QuantRecord, second: QuantRecord, atol: float, rtol: float) -> list[Difference]:
    """Compare two records.

    Args:
        first: One record.
        second: The other.
        atol: Absolute tolerance of the scales.
        rtol: Tolerance of the scales relative to the larger one; they are equal within either. Integers and words
            must be the same.

    Returns:
        One entry per layer that only one side has and per field that differs.

    Example:
        >>> make = lambda scale: QuantRecord({"fc": LayerRecord(scale, 3, [0.25], [0])})
        >>> [(d.field, d.first, d.second) for d in differences(make(0.5), make(0.625), atol=0, rtol=0)]
        [('scale_d', '0.5', '0.625')]
        >>> differences(make(0.5), make(0.625), atol=0, rtol=0.25)
        []
    """
    found: list[Difference] = []
    for name in dict.fromkeys([*first, *second]):
        if name in first and name in second:
            found += _layer_differences(name, first[name], second[name], atol, rtol)
        else:
            found.append(Difference(name, "", *("present" if name in side else "missing" for side in (first, second))))
    return found


def difference_table(found: list[Difference], first: str, second: str) -> Table:
    """Return a table of differences.

    Args:
        found: The differences.
        first: Name of the first file.
        second: Name of the second file.
    """
    table = new_table("layer", "field", first, second, "difference")
    for row in found:
        table.add_row(row.layer, row.field, row.first, row.second, row.note)
    return table


def _line(layer: LayerRecord, scale: float, offset: int, scales: list[float]) -> list[str]:
    low, high = OFFSET_RANGES[layer.act_type]
    ends = [_short(scale * (end - offset)) for end in (low, high)]
    sizes = [str(len(scales)), _short(min(scales)), _short(max(scales))] if scales else ["0", "", ""]
    return [layer.act_type, _short(scale), str(offset), *ends, layer.wts_type, *sizes]


def _shifts(shifts: list[int]) -> str:
    low, high = min(shifts, default=0), max(shifts, default=0)
    return str(low) if low == high else f"{low}..{high}"


def _short(value: float) -> str:
    return f"{value:.5g}"


def _exact(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)  # 9 digits tell any two float32 apart


def _layer_differences(
    name: str, first: LayerRecord, second: LayerRecord, atol: float, rtol: float
) -> Iterator[Difference]:
    for field, here, there in _fields(first, second):
        if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
            wrong = [n for n, pair in enumerate(zip(here, there, strict=True)) if not _close(*pair, atol, rtol)]
            if wrong:
                worst = max(wrong, key=lambda n: _relative(here[n], there[n]))
                one, other = here[worst], there[worst]
                note = f"{_note(one, other)} ({len(wrong)} of {len(here)} values; this is the worst)".strip()
                yield Difference(name, f"{field}[{worst}]", _exact(one), _exact(other), note)
        elif isinstance(here, list) and isinstance(there, list):
            yield Difference(name, field, f"{len(here)} values", f"{len(there)} values")
        elif not _close(here, there, atol, rtol):
            yield Difference(name, field, _exact(here), _exact(there), _note(here, there))


def _fields(first: LayerRecord, second: LayerRecord) -> Iterator[tuple[str, Any, Any]]:
    for item in fields(first):
        here, there = getattr(first, item.name), getattr(second, item.name)
        if item.name == "kv_cache" and here is not None and there is not None:
            yield "kv_cache.scale", here.scale, there.scale
            yield "kv_cache.offset", here.offset, there.offset
        else:
            yield item.name, here, there


def _close(here: Any, there: Any, atol: float, rtol: float) -> bool:
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=rtol, abs_tol=atol)
    return bool(here == there)


def _relative(here: float, there: float) -> float:
    largest = max(abs(here), abs(there))
    return abs(here - there) / largest if largest else 0.0


def _note(here: Any, there: Any) -> str:
    if isinstance(here, float) and isinstance(there, float):
        return f"{_relative(here, there):.2g} relative, {abs(here - there):.2g} absolute"
    return ""
