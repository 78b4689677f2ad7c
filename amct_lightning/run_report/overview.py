"""An overview of a run in one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amct_lightning.run_report.curves import draw_panel, draw_ribbon, panels, shade, spans
from amct_lightning.run_report.layers import SIDES, changes, draw_boxes, draw_dumbbells, sqnr_rows
from amct_lightning.run_report.ranges import draw_range, most_moved, ranges
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import label_rows, label_steps, new_figure, row_height, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

_WIDTH = 11.43
_MOST_ROWS = 22
_MOST_RANGES = 4
_MOST_PANELS = 2


def draw_overview(run: Run) -> Figure:
    """Draw the curves, SQNR, the weight scales and the ranges that moved most, as far as they are known.

    Args:
        run: What was found of a run.

    Returns:
        The figure.

    Raises:
        FileNotFoundError: If there is nothing to draw.
    """
    above: list[Callable[[FigureBase, Run], None]] = []
    if panels(run.metrics):
        above.append(_curves)
    if sqnr_rows(run.monitor) or run.scales:
        above.append(_layers)
    if not above:
        raise FileNotFoundError(f"'{run.source}' holds nothing to draw: no metrics, no SQNR and no weight scales.")
    has_ranges = bool(ranges(run.monitor))
    figure = new_figure(6.8 if has_ranges else 4.9, width=_WIDTH)
    parts = figure.subfigures(1 + has_ranges, 1, height_ratios=(2.5, 1)[: 1 + has_ranges], squeeze=False)[:, 0]
    places = parts[0].subfigures(1, len(above), squeeze=False, wspace=0.03)[0]
    for place, draw in zip(places, above, strict=True):
        draw(place, run)
    if has_ranges:
        _ranges(parts[1], run)
    return figure


def _curves(part: FigureBase, run: Run) -> None:
    drawn = panels(run.metrics, _MOST_PANELS)
    last = run.last_step
    found = spans(run.phases, last)
    ratios = [0.1] * bool(found) + [1.0] * len(drawn)
    axes = part.subplots(len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    if found:
        draw_ribbon(axes[0], found, last, "phase")
    for ax, (title, series) in zip(axes[bool(found) :], drawn.items(), strict=True):
        shade(ax, found, last)
        draw_panel(ax, title, series, room=45)
    axes[-1].set_xlim(-0.015 * last, 1.015 * last)
    label_steps(axes[-1])


def _layers(part: FigureBase, run: Run) -> None:
    measured = sqnr_rows(run.monitor, _MOST_ROWS)
    names = measured or list(run.scales)[:_MOST_ROWS]
    scales = {name: scale for name, scale in run.scales.items() if name in names and scale.count > scale.unusable}
    columns = [side for side in SIDES if measured and changes(run.monitor, side[0])]
    axes = part.subplots(1, len(columns) + bool(scales), sharey=True, squeeze=False)[0]
    for ax, (column, title) in zip(axes, columns, strict=False):
        draw_dumbbells(ax, changes(run.monitor, column), names)
        ax.set_title(title)
        ax.set_xlabel("SQNR in dB")
    if scales:
        draw_boxes(axes[-1], [scales.get(name) for name in names], ticks=3)
        axes[-1].set_title("weight scales")
        axes[-1].set_xlabel("logarithmic")
    label_rows(axes[0], names, row_height(len(names)), length=22)
    handles, labels = axes[0].get_legend_handles_labels()
    if columns:
        part.legend(handles, labels, loc="outside upper right", ncols=4, columnspacing=1.2)


def _ranges(part: FigureBase, run: Run) -> None:
    found, last = most_moved(ranges(run.monitor), _MOST_RANGES), run.last_step
    axes = part.subplots(1, len(found), squeeze=False, sharex=True)[0]
    for ax, item in zip(axes, found, strict=True):
        shade(ax, spans(run.phases, last), last)
        draw_range(ax, item)
        ax.set_title(f"range of {shorten(item.layer, 22)}")
        ax.set_xlim(-0.02 * last, 1.02 * last)
        label_steps(ax, ticks=4)
    handles, labels = axes[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=2, columnspacing=1.2)
