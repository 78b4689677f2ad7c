"""The tables of the report as HTML, every name escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from amct_lightning.conversion.report import ReportRow
from amct_lightning.record import LayerRecord
from amct_lightning.record.numeric import to_float32
from amct_lightning.run_report.curves import OWN
from amct_lightning.run_report.layers import Change, changes
from amct_lightning.run_report.logs import Metrics, Monitor
from amct_lightning.run_report.scales import ScaleSummary
from amct_lightning.run_report.style import clean


class Numeric(str):
    """A number as text; in a table it stands on the right."""

    __slots__ = ()


Cell = str | int | float | None
NOTHING = Numeric("–")


def text(value: object) -> str:
    """Return a text for HTML: escaped, without control characters.

    Example:
        >>> text("<script>")
        '&lt;script&gt;'
    """
    return escape(clean(str(value)))


def number(value: float | None, digits: int = 4) -> Numeric:
    """Show a number with few significant digits.

    Example:
        >>> number(0.0123456), number(None), number(1234567.0), number(float("nan"))
        ('0.01235', '–', '1.235e+06', 'NaN')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return Numeric("NaN" if math.isnan(value) else "∞" if value > 0 else "-∞")
    return Numeric(f"{value:.{digits}g}")


def percent(value: float | None) -> Numeric:
    """Show a share.

    Example:
        >>> percent(0.0625), percent(0.0)
        ('6.25 %', '0 %')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return Numeric(f"{number(100 * value, 3)} %")


def float32(value: float) -> Numeric:
    """Show a float32 number with as many digits as tell it from its neighbours, like the record file.

    Example:
        >>> float32(to_float32("scale", 0.008161441))
        '0.008161441'
    """
    texts = (f"{value:.{digits}g}" for digits in range(1, 18))
    return Numeric(next(shown for shown in texts if to_float32("", float(shown)) == value))


def table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[Cell]], dim: Sequence[bool] = ()) -> str:
    """Return a table; its first column names the rows. Numbers are shown with few digits and stand on the right.

    Args:
        caption: What it shows.
        titles: The titles of the columns.
        rows: The cells.
        dim: Which rows matter less.
    """
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(titles))]
    heads = (f'<th scope="col"{_kind(right)}>{text(title)}</th>' for title, right in zip(titles, numeric, strict=True))
    lines = [
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table>',
        f"<caption>{text(caption)}</caption>",
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>",
    ]
    for place, (name, *cells) in enumerate(rows):
        kind = ' class="dim"' if place < len(dim) and dim[place] else ""
        lines.append(f'<tr{kind}><th scope="row">{_breakable(name)}</th>{"".join(map(_cell, cells))}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(value: Cell) -> str:
    shown = value if isinstance(value, str) else str(value) if isinstance(value, int) else number(value)
    return f"<td{_kind(_is_number(value))}>{text(shown)}</td>"


def _breakable(name: Cell) -> str:
    """Let a dotted name break behind its dots."""
    return text(name).replace(".", ".<wbr>")


def _is_number(value: Cell) -> bool:
    return not isinstance(value, str) or isinstance(value, Numeric)


def _kind(right: bool) -> str:
    return ' class="number"' if right else ""


def metric_table(metrics: Metrics) -> str:
    """Return the table of what was logged: first, last, lowest and highest value of each metric."""
    rows = []
    for name, series in metrics.series.items():
        finite = series.finite()
        if name.startswith(OWN) or not len(series):
            continue
        low = min(range(len(finite)), key=finite.values.__getitem__, default=None)
        high = max(range(len(finite)), key=finite.values.__getitem__, default=None)
        ends = [
            cell
            for place in (low, high)
            for cell in ((None, None) if place is None else (finite.values[place], finite.steps[place]))
        ]
        rows.append((name, len(series), series.values[0], series.values[-1], series.steps[-1], *ends))
    titles = ("metric", "values", "first", "last", "at step", "lowest", "at step", "highest", "at step")
    return table("What was logged", titles, rows)


def conversion_table(rows: Sequence[ReportRow]) -> str:
    """Return the table of what was done to each layer."""
    cells = [
        (
            row.name,
            row.type,
            row.bits if row.quantized else "float",
            f"{row.weight_algo}{', per channel' if row.channel_wise else ', per tensor'}" if row.quantized else "",
            row.batch_norm or "",
            row.reason or _remarks(row),
        )
        for row in rows
    ]
    titles = ("layer", "type", "bits", "weight scales", "folds BatchNorm", "remarks")
    return table("What the conversion did to each layer", titles, cells, [not row.quantized for row in rows])


def _remarks(row: ReportRow) -> str:
    remarks = ["input never negative"] if row.fixed_min else []
    remarks += [f"shares its input with {', '.join(row.shares_with)}"] if row.shares_with else []
    return "; ".join(remarks + ([f"called {row.calls} times"] if row.calls > 1 else []))


def sqnr_table(monitor: Monitor) -> str:
    """Return the table of SQNR before and after, all layers."""
    activations, weights = changes(monitor, "sqnr_input_db"), changes(monitor, "sqnr_weight_db")
    titles = (
        "layer",
        *(f"{part}, {when}" for part in ("activations", "weights") for when in ("before", "after", "change")),
    )
    rows = [(layer, *_change(activations.get(layer)), *_change(weights.get(layer))) for layer in monitor]
    return table("SQNR in dB, in the first interval after the calibration and in the last one", titles, rows)


def _change(change: Change | None) -> tuple[Numeric, Numeric, Numeric]:
    if change is None:
        return (NOTHING,) * 3
    difference = round(change.after - change.before, 1)
    return (
        Numeric(f"{change.before:.1f}"),
        Numeric(f"{change.after:.1f}"),
        Numeric(f"{difference:+.1f}" if difference else "0.0"),
    )


def monitor_table(monitor: Monitor) -> str:
    """Return the table of what QuantMonitor saw last of each layer."""
    shown = (
        ("clip_min", "clip_min", number),
        ("clip_max", "clip_max", number),
        ("scale", "scale", number),
        ("offset", "offset", number),
        ("clipped below", "saturation_low", percent),
        ("clipped above", "saturation_high", percent),
        ("levels in use", "utilisation", percent),
        ("drift of the range", "clip_drift", percent),
        ("weight scale, mean", "weight_scale_mean", number),
        ("drift of the weight scales", "weight_scale_drift", percent),
    )
    rows = []
    for layer, columns in monitor.items():
        last = {name: series.values[-1] for name, series in columns.items() if len(series)}
        rows.append((layer, *(form(last.get(column)) for _, column, form in shown)))
    return table("Each layer in the last interval", ("layer", *(title for title, _, _ in shown)), rows)


def scale_table(scales: Mapping[str, ScaleSummary]) -> str:
    """Return the table of the weight scales by layer."""
    titles = ("layer", "scales", "smallest", "median", "largest", "largest / smallest", "not usable")
    rows = [(name, s.count, s.low, s.middle, s.high, s.spread, s.unusable) for name, s in scales.items()]
    return table("Weight scales", titles, rows)


def record_table(record: Mapping[str, LayerRecord]) -> str:
    """Return the table of the factors in a record."""
    titles = (
        "layer",
        "activations",
        "scale_d",
        "offset_d",
        "weights",
        "scale_w",
        "smallest scale_w",
        "largest scale_w",
    )
    recurrent = any(layer.scale_h is not None for layer in record.values())
    rows: list[list[Cell]] = []
    for name, layer in record.items():
        ends = [float32(end(layer.scale_w)) if layer.scale_w else None for end in (min, max)]
        cells: list[Cell] = [name, layer.act_type, float32(layer.scale_d), layer.offset_d, layer.wts_type]
        cells += [len(layer.scale_w), *ends]
        if recurrent:
            cells += [None if layer.scale_h is None else float32(layer.scale_h), layer.offset_h]
        rows.append(cells)
    return table("The record", (*titles, *(("scale_h", "offset_h") if recurrent else ())), rows)
