"""What a monitor found last, as a table for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from amct_lightning.monitor_format import LayerReading
from amct_lightning.wording import TEXT_BOX, as_html, as_text

_TITLES = ("Input\nSQNR", "Weight\nSQNR", "Range", "Clipped", "Levels\nused", "Range\ndrift", "Scale\ndrift")
_LEGEND = "SQNR: signal to quantization noise ratio; drift: change since the calibration"


@dataclass(frozen=True, repr=False)
class MonitorSummary:
    """The findings of an interval; it shows itself as a table, the layers with the noisiest input first.

    In a notebook the table is HTML.

    Attributes:
        step: The Trainer's ``global_step`` at the end of the interval.
        readings: The findings.
        limit: Number of layers that the table shows, ``None`` for all.

    Example:
        >>> summary = MonitorSummary(50, (LayerReading("a", sqnr_input_db=20.0), LayerReading("b", sqnr_input_db=9.0)))
        >>> [reading.layer for reading in summary.worst_first]
        ['b', 'a']
    """

    step: int
    readings: tuple[LayerReading, ...]
    limit: int | None = None

    @property
    def worst_first(self) -> list[LayerReading]:
        """The readings by falling noise of the activations, then of the weights; those with neither last."""
        return sorted(self.readings, key=lambda r: (_order(r.sqnr_input_db), _order(r.sqnr_weight_db)))

    def __rich__(self) -> RenderableType:
        """Give rich what it shows."""
        return Group(Text(f"{self._head}\n"), _table(self._shown))

    def __str__(self) -> str:
        """Give the table as plain text that fits the terminal."""
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Give the table to a notebook."""
        titles = ["Layer", *(title.replace("\n", " ") for title in _TITLES)]
        return as_html(self._head, titles, map(_cells, self._shown))

    @property
    def _shown(self) -> list[LayerReading]:
        return self.worst_first[: self.limit]

    @property
    def _head(self) -> str:
        shown, all_ = len(self._shown), len(self.readings)
        count = f"the worst {shown} of {all_}" if shown < all_ else "all"
        return f"Quantization at step {self.step}, {count} layers ({_LEGEND})."


def _table(readings: list[LayerReading]) -> Table:
    table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Layer", overflow="fold")
    for title in _TITLES:
        table.add_column(title, justify="right", no_wrap=True)
    for reading in readings:
        table.add_row(*map(Text, _cells(reading)))
    return table


def _cells(reading: LayerReading) -> tuple[str, ...]:
    return (
        reading.layer,
        _decibels(reading.sqnr_input_db),
        _decibels(reading.sqnr_weight_db),
        _range(reading.clip_min, reading.clip_max),
        _percent(reading.saturation, 2),
        _percent(reading.utilisation),
        _percent(reading.clip_drift, 1),
        _percent(reading.weight_scale_drift, 1),
    )


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g} .. {high:.3g}"


def _order(value: float | None) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else value
