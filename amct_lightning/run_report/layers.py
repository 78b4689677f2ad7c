"""The pictures with a row for each layer: SQNR before and after, and the distribution of the weight scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from amct_lightning.run_report.logs import Monitor, finite
from amct_lightning.run_report.style import BLUE, GREEN, MOST_ROWS, MUTED, ORANGE, PAPER, label_rows, log_ticks

SIDES = {"activations": "sqnr_input_db", "weights": "sqnr_weight_db"}
"""What SQNR is about, and its column."""


@dataclass(frozen=True)
class Change:
    """A number of a layer in the first interval after its calibration, and in the last one."""

    before: float
    after: float


Changes = dict[str, dict[str, Change]]
"""By side (activations, weights) the SQNR of each layer."""


def sqnr_changes(monitor: Monitor) -> Changes:
    """Return the first SQNR since the calibration and the last one, by side and layer.

    Args:
        monitor: What QuantMonitor wrote; layers without a finite value since then are left out.

    Example:
        >>> columns = {"sqnr_weight_db": {0: 9.0, 9: 20.0, 19: 30.5}, "clip_max": {9: 1.0, 19: 1.0}}
        >>> sqnr_changes({"fc": columns})
        {'activations': {}, 'weights': {'fc': Change(before=20.0, after=30.5)}}
    """
    starts = {layer: min(columns["clip_max"]) for layer, columns in monitor.items() if columns.get("clip_max")}
    first = min(starts.values(), default=0)  # a layer that shares another's range has no clips of its own
    found: Changes = {side: {} for side in SIDES}
    for side, column in SIDES.items():
        for layer, columns in monitor.items():
            since = starts.get(layer, first)
            values = [v for step, v in finite(columns.get(column, {})).items() if step >= since]
            if values:
                found[side][layer] = Change(values[0], values[-1])
    return found


def lowest_sqnr(changes: Changes, layers: Sequence[str], most: int) -> list[str]:
    """Return the layers whose SQNR is drawn: all of them, or those with the lowest, in the order given.

    Args:
        changes: The SQNR.
        layers: All layers.
        most: How many to return.
    """
    known = [layer for layer in layers if any(layer in side for side in changes.values())]
    lowest = sorted(known, key=lambda name: min(side[name].after for side in changes.values() if name in side))[:most]
    return [layer for layer in known if layer in set(lowest)]


def usable(scales: Sequence[float]) -> list[float]:
    """Return the scales that a record can hold: finite and above 0."""
    return [scale for scale in scales if math.isfinite(scale) and scale > 0]


def quartiles(scales: list[float]) -> list[float]:
    """Return the value that a quarter of the scales is below, the median, and the one that a quarter is above.

    Example:
        >>> quartiles([0.5, 0.1, 0.2, 0.3, 0.4]), quartiles([0.5])
        ([0.2, 0.3, 0.4], [0.5, 0.5, 0.5])
    """
    return quantiles(scales, method="inclusive") if len(scales) > 1 else scales * 3


def draw_layers(
    part: FigureBase, layers: Sequence[str], changes: Changes, scales: Mapping[str, list[float]], length: int = 30
) -> None:
    """Draw SQNR and weight scales in columns beside each other, as far as they are given; a row for each layer.

    Args:
        part: Where.
        layers: The layers, from the top.
        changes: The SQNR; a side without any is left out.
        scales: The weight scales, only usable ones.
        length: The longest name that there is room for.
    """
    sides = [side for side in changes if changes[side]]
    shown = [scales.get(layer, []) for layer in layers] if scales else []
    axes = part.subplots(1, len(sides) + bool(shown), sharey=True, squeeze=False)[0]
    for ax, side in zip(axes, sides, strict=False):
        _draw_dumbbells(ax, [changes[side].get(layer) for layer in layers])
        ax.set_title(side)
        ax.set_xlabel("SQNR in dB")
    if shown:
        _draw_boxes(axes[-1], shown, ticks=3 if sides else 9)
        axes[-1].set_title("weight scales")
        axes[-1].set_xlabel("logarithmic")
    label_rows(axes[0], layers, length)
    handles, labels = axes[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=4)


def _draw_dumbbells(ax: Axes, changes: Sequence[Change | None]) -> None:
    """Draw a value before and after in each row."""
    rows = [(place, change) for place, change in enumerate(changes) if change]
    for name, colour, lines in (
        ("better", GREEN, [(p, c) for p, c in rows if c.after > c.before]),
        ("worse", ORANGE, [(p, c) for p, c in rows if c.after < c.before]),
    ):
        starts, ends = [c.before for _, c in lines], [c.after for _, c in lines]
        ax.hlines([p for p, _ in lines], starts, ends, color=colour.light, lw=1.8, alpha=0.7, label=name)
    places, before, after = zip(*((p, c.before, c.after) for p, c in rows), strict=True)
    ax.scatter(before, places, s=20, color=PAPER.light, edgecolor=MUTED.light, zorder=3, label="after calibration")
    ax.scatter(after, places, s=20, color=BLUE.light, zorder=3.1, label="last interval")
    ax.margins(x=0.06)


def _draw_boxes(ax: Axes, scales: Sequence[list[float]], ticks: int) -> None:
    """Draw the scales in each row: a line over all of them, a box from quarter to three quarters, the median."""
    rows = [(place, min(row), max(row), *quartiles(row)) for place, row in enumerate(scales) if row]
    places, lows, highs, lower, middle, upper = zip(*rows, strict=True)
    thick = 7.0 if len(scales) <= MOST_ROWS else 3.0
    ax.hlines(places, lows, highs, color=MUTED.light, lw=1, label="all")
    ax.hlines(places, lower, upper, color=BLUE.light, alpha=0.45, lw=thick, label="middle half")
    ax.scatter(middle, places, s=14, color=BLUE.light, zorder=3, label="median")
    ax.set_xscale("log")
    log_ticks(ax.xaxis, lows + highs, ticks)
