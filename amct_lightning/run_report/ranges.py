"""The pictures of the activation ranges over the training steps: the layers that moved most, and all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure, FigureBase

from amct_lightning.run_report.curves import shade, spans
from amct_lightning.run_report.logs import Monitor, Series, all_steps, finite
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import BLUE, MUTED, ORANGE, label_rows, label_steps, row_height, shorten

_LEAST_CHANGE = 0.05
"""The colours span at least this change of the width, as a power of two, so that noise does not look like drift."""
_MOST_CHANGE = 3.0


@dataclass(frozen=True)
class Range:
    """The range of a layer's input over the steps at which both ends are known; at least one.

    Attributes:
        layer: The layer.
        upper: ``clip_max``.
        lower: ``clip_min``, at the same steps.
    """

    layer: str
    upper: Series
    lower: Series

    @property
    def widths(self) -> Series:
        """The widths as multiples of the first one; empty if that is none."""
        widths = {step: value - self.lower[step] for step, value in self.upper.items()}
        first = next(iter(widths.values()))
        return {step: width / first for step, width in widths.items()} if first > 0 else {}

    @property
    def growth(self) -> float:
        """The last width as a multiple of the first one."""
        return [math.nan, *self.widths.values()][-1]

    @property
    def moved(self) -> float:
        """How far both ends have moved together from the first to the last step, in widths of the first range."""
        upper, lower = [*self.upper.values()], [*self.lower.values()]
        way = abs(upper[-1] - upper[0]) + abs(lower[-1] - lower[0])
        return way / (upper[0] - lower[0]) if upper[0] > lower[0] else 0.0


def ranges(monitor: Monitor) -> list[Range]:
    """Return the ranges of the layers that have one, in the order of the file.

    Args:
        monitor: What QuantMonitor wrote.

    Example:
        >>> found = ranges({"fc": {"clip_max": {0: 2.0, 9: 3.0}, "clip_min": {0: -2.0, 9: -3.0}}})[0]
        >>> found.moved, found.growth
        (0.5, 1.5)
    """
    found = []
    for layer, columns in monitor.items():
        upper, lower = (finite(columns.get(name, {})) for name in ("clip_max", "clip_min"))
        steps = [step for step in upper if step in lower]
        if steps:
            found.append(Range(layer, {step: upper[step] for step in steps}, {step: lower[step] for step in steps}))
    return found


def most_moved(found: Sequence[Range], most: int) -> list[Range]:
    """Return the layers whose ranges have moved most, in the order given."""
    chosen = {item.layer for item in sorted(found, key=lambda item: -item.moved)[:most]}
    return [item for item in found if item.layer in chosen]


def draw_ranges(part: FigureBase, run: Run, found: Sequence[Range], columns: int) -> None:
    """Draw both ends of the range of each layer in a panel of its own.

    Args:
        part: Where.
        run: The run.
        found: The layers, not too many.
        columns: The number of panels beside each other.
    """
    last = run.steps
    rows = math.ceil(len(found) / columns)
    grid = part.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for place, (ax, item) in enumerate(zip(grid, found, strict=False)):
        shade(ax, spans(run.phases, last))
        marker = "o" if len(item.upper) <= 3 else ""
        for name, end, colour in (("clip_max", item.upper, ORANGE), ("clip_min", item.lower, BLUE)):
            ax.plot([*end], [*end.values()], color=colour.light, marker=marker, label=name)
        ax.axhline(0, color=MUTED.light, lw=0.6, ls=":")
        ax.margins(y=0.12)
        ax.set_title(shorten(item.layer, 24), fontsize=8.5)
        ax.set_title(f"×{item.growth:.3g}", loc="right", fontsize=7.5, fontweight="normal", color=MUTED.light)
        label_steps(ax, last, ticks=4)
        if place + columns < len(found):
            ax.set_xlabel("")
        else:
            ax.tick_params(labelbottom=True)
    for ax in grid[len(found) :]:
        ax.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=2)


def draw_all_widths(figure: Figure, run: Run, found: Sequence[Range]) -> None:
    """Draw the width of all ranges relative to the first one: a row per layer, a colour per change.

    Args:
        figure: Where.
        run: The run.
        found: The layers.
    """
    steps = all_steps({"": item.upper} for item in found)
    rows = [[_power_of_2(widths.get(step, 0.0)) for step in steps] for widths in (item.widths for item in found)]
    limit = min(_MOST_CHANGE, max([_LEAST_CHANGE, *(abs(v) for row in rows for v in row if math.isfinite(v))]))
    ax = figure.subplots()
    edges = [*steps, max(run.steps, steps[-1] + 1)]  # a width counts until the next one is known
    places = [place - 0.5 for place in range(len(found) + 1)]
    image = ax.pcolormesh(edges, places, rows, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True)
    label_rows(ax, [item.layer for item in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    label_steps(ax, run.steps)
    bar = figure.colorbar(
        image, ax=ax, aspect=30, pad=0.015, shrink=min(1.0, 5 / (row_height(len(found)) * len(found)))
    )
    ticks = [-limit, -limit / 2, 0.0, limit / 2, limit]
    bar.set_ticks(ticks, labels=[f"×{2**tick:.3g}" for tick in ticks])
    bar.set_label("width relative to the first one")


def _power_of_2(width: float) -> float:
    return math.log2(width) if width > 0 else math.nan
