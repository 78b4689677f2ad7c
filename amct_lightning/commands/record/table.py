"""Records as tables: what is in one, and where two of them differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from amct_lightning.commands.output import new_table
from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.record.checks import OFFSET_RANGES
from amct_lightning.record.compare import Difference
from amct_lightning.wording import printable


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
        table.add_row(*_cells(name, *_line(layer, layer.scale_d, layer.offset_d, layer.scale_w), *shift))
        if layer.scale_h is not None and layer.offset_h is not None:
            table.add_row(*_cells(f"{name} (hidden)", *_line(layer, layer.scale_h, layer.offset_h, layer.scale_r)))
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


def difference_table(found: list[Difference], first: str, second: str) -> Table:
    """Return a table of differences; of a list that differs it shows the worst value.

    Args:
        found: The differences.
        first: Name of the first file.
        second: Name of the second file.
    """
    table = new_table("layer", "field", first, second, "difference")
    for difference in found:
        table.add_row(*_cells(*_row(difference)))
    return table


def _cells(*texts: str) -> list[Text]:
    """Take texts as they are: in the name of a layer rich would find markup, and a terminal commands."""
    return [Text(printable(text)) for text in texts]


def _row(found: Difference) -> tuple[str, ...]:
    here, there, field, count = found.here, found.there, found.field, ""
    if not field and not found.layer:
        return "(pruning, key/value caches)", "", "", "", "the entries of these features differ"
    if not field:
        return found.layer, "", *("missing" if side is None else "present" for side in (here, there)), ""
    if found.places:
        worst = max(found.places, key=lambda place: _relative(here[place], there[place]))
        count = f"({len(found.places)} of {len(here)} values; this is the worst)"
        here, there, field = here[worst], there[worst], f"{field}[{worst}]"
    elif isinstance(here, list) and isinstance(there, list):
        here, there = f"{len(here)} values", f"{len(there)} values"
    note = ""
    if isinstance(here, float) and isinstance(there, float):
        note = f"{_relative(here, there):.2g} relative, {abs(here - there):.2g} absolute"
    return found.layer, field, _exact(here), _exact(there), f"{note} {count}".strip()


def _line(layer: LayerRecord, scale: float | None, offset: int | None, scales: list[float]) -> list[str]:
    factors = [""] * 4
    if scale is not None and offset is not None:
        ends = (_short(scale * (end - offset)) for end in OFFSET_RANGES[layer.act_type])
        factors = [_short(scale), str(offset), *ends]
    sizes = [str(len(scales)), _short(min(scales)), _short(max(scales))] if scales else ["0", "", ""]
    return [layer.act_type, *factors, layer.wts_type, *sizes]


def _shifts(shifts: list[int]) -> str:
    low, high = min(shifts, default=0), max(shifts, default=0)
    return str(low) if low == high else f"{low}..{high}"


def _short(value: float) -> str:
    return f"{value:.5g}"


def _exact(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)  # 9 digits tell any two float32 apart


def _relative(here: float, there: float) -> float:
    largest = max(abs(here), abs(there))
    return abs(here - there) / largest if largest else 0.0
