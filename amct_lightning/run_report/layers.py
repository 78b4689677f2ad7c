"""The figures with a row for each layer: SQNR before and after, and the distribution of the weight scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amct_lightning.run_report.logs import Monitor, Series
from amct_lightning.run_report.scales import ScaleSummary
from amct_lightning.run_report.style import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PAPER,
    label_rows,
    log_ticks,
    new_figure,
    row_height,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 60
SIDES = (("sqnr_input_db", "activations"), ("sqnr_weight_db", "weights"))
"""The columns of SQNR, and what they are about."""


@dataclass(frozen=True)
class Change:
    """A number of a layer in the first interval after its calibration and in the last one.

    Attributes:
        first_step: Step of the first one.
        before: Its value.
        last_step: Step of the last one.
        after: Its value.
    """

    first_step: int
    before: float
    last_step: int
    after: float


def changes(monitor: Monitor, column: str) -> dict[str, Change]:
    """Return the first value of a column since the calibration and the last one, by layer.

    Args:
        monitor: What QuantMonitor wrote.
        column: The column.

    Returns:
        The changes; layers without a finite value since then are left out.

    Example:
        >>> columns = {"sqnr_weight_db": Series((0, 9, 19), (9.0, 20.0, 30.5)), "clip_max": Series((9, 19), (1.0, 1.0))}
        >>> changes({"fc": columns}, "sqnr_weight_db")
        {'fc': Change(first_step=9, before=20.0, last_step=19, after=30.5)}
    """
    starts = {layer: columns.get("clip_max", Series()).steps[:1] for layer, columns in monitor.items()}
    first = min((steps[0] for steps in starts.values() if steps), default=0)
    known = {}
    for layer, columns in monitor.items():
        # A layer that shares another's range has no clips of its own.
        series = columns.get(column, Series()).since(*(starts[layer] or (first,))).finite()
        if len(series):
            known[layer] = Change(series.steps[0], series.values[0], series.steps[-1], series.values[-1])
    return known


def sqnr_rows(monitor: Monitor, most: int = MOST_ROWS) -> list[str]:
    """Return the layers whose SQNR is drawn: all of them, or those with the lowest, in the order of the file.

    Args:
        monitor: What QuantMonitor wrote.
        most: How many to return.
    """
    lowest: dict[str, float] = {}
    for column, _ in SIDES:
        for layer, change in changes(monitor, column).items():
            lowest[layer] = min(change.after, lowest.get(layer, change.after))
    chosen = set(sorted(lowest, key=lambda layer: lowest[layer])[:most])
    return [layer for layer in monitor if layer in chosen]


def draw_sqnr(monitor: Monitor, layers: Sequence[str]) -> Figure:
    """Draw SQNR before and after, a panel for the activations and one for the weights.

    Args:
        monitor: What QuantMonitor wrote.
        layers: The layers to draw.

    Returns:
        The figure.
    """
    height = row_height(len(layers))
    figure = new_figure(height * len(layers) + 0.95)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (column, title) in zip(axes, SIDES, strict=True):
        draw_dumbbells(ax, changes(monitor, column), layers)
        ax.set_title(title)
        ax.set_xlabel("SQNR in dB")
    label_rows(axes[0], layers, height)
    axes[1].tick_params(labelleft=False)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[0]))
    figure.legend(handles, labels, loc="outside upper right", ncols=4, columnspacing=1.4)
    return figure


def draw_dumbbells(ax: Axes, found: Mapping[str, Change], layers: Sequence[str]) -> None:
    """Draw a value before and after for each layer.

    Args:
        ax: Where.
        found: The values by layer.
        layers: The layers, from the top.
    """
    rows = [(place, found[layer]) for place, layer in enumerate(layers) if layer in found]
    if not rows:
        ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", color=MUTED.light)
        return
    places = [place for place, _ in rows]
    before, after = [change.before for _, change in rows], [change.after for _, change in rows]
    for name, colour, lines in (
        ("better", GREEN, [(p, c) for p, c in rows if c.after > c.before]),
        ("worse", ORANGE, [(p, c) for p, c in rows if c.after < c.before]),
    ):
        starts, ends = [c.before for _, c in lines], [c.after for _, c in lines]
        ax.hlines([p for p, _ in lines], starts, ends, color=colour.light, lw=1.8, alpha=0.7, label=name)
    ax.scatter(
        before, places, s=20, facecolor=PAPER.light, edgecolor=MUTED.light, lw=1, zorder=3, label="after calibration"
    )
    ax.scatter(after, places, s=20, color=BLUE.light, zorder=3.1, label="last interval")
    ax.margins(x=0.06)


def draw_scales(scales: Mapping[str, ScaleSummary]) -> Figure:
    """Draw the weight scales of each layer as a box from quarter to three quarters, and a line over all of them.

    Args:
        scales: The summaries by layer; at least one has a usable scale.

    Returns:
        The figure.
    """
    height = row_height(len(scales))
    figure = new_figure(height * len(scales) + 0.8)
    ax = figure.subplots()
    draw_boxes(ax, list(scales.values()))
    label_rows(ax, list(scales), height)
    ax.set_xlabel("weight scale (logarithmic)")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, columnspacing=1.4)
    return figure


def draw_boxes(ax: Axes, scales: Sequence[ScaleSummary | None], ticks: int = 9) -> None:
    """Draw one box per summary, from the top.

    Args:
        ax: Where.
        scales: The summaries; ``None`` leaves a row empty.
        ticks: The number of ticks that there is room for.
    """
    rows = [(place, scale) for place, scale in enumerate(scales) if scale and scale.count > scale.unusable]
    places = [place for place, _ in rows]
    thick = 7.0 if len(scales) <= MOST_ROWS else 3.0
    ax.hlines(places, [s.low for _, s in rows], [s.high for _, s in rows], color=MUTED.light, lw=1, label="all")
    ax.hlines(
        places,
        [s.quarter for _, s in rows],
        [s.three_quarters for _, s in rows],
        color=BLUE.light,
        alpha=0.45,
        lw=thick,
        label="middle half",
    )
    ax.scatter([s.middle for _, s in rows], places, s=14, color=BLUE.light, zorder=3, label="median")
    ax.set_xscale("log")
    log_ticks(ax.xaxis, [s.low for _, s in rows] + [s.high for _, s in rows], ticks)
