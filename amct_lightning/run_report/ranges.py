"""The figures of the activation ranges over the training steps: the layers that moved most, and all layers at once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amct_lightning.run_report.curves import Span, shade
from amct_lightning.run_report.logs import Monitor, Series
from amct_lightning.run_report.style import (
    BLUE,
    MUTED,
    ORANGE,
    WIDTH,
    colour_map,
    label_rows,
    label_steps,
    new_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYERS = 12
_COLUMNS = 3
_MOST_POINTS = 400
_CELLS = 240
_LEAST_CHANGE = 0.05
"""The colours span at least this change of the width, as a power of two, so that noise does not look like drift."""
_MOST_CHANGE = 3.0


@dataclass(frozen=True)
class Range:
    """The range of a layer's input over the steps at which both ends are known.

    Attributes:
        layer: The layer.
        steps: The steps.
        upper: ``clip_max``.
        lower: ``clip_min``.
    """

    layer: str
    steps: tuple[int, ...]
    upper: tuple[float, ...]
    lower: tuple[float, ...]

    @property
    def moved(self) -> float:
        """How far both ends have moved together from the first to the last step, in widths of the first range."""
        width = self.upper[0] - self.lower[0]
        way = abs(self.upper[-1] - self.upper[0]) + abs(self.lower[-1] - self.lower[0])
        return way / width if width > 0 else 0.0

    @property
    def growth(self) -> float:
        """The last width as a multiple of the first one."""
        width = self.upper[0] - self.lower[0]
        return (self.upper[-1] - self.lower[-1]) / width if width > 0 else math.nan


def ranges(monitor: Monitor) -> list[Range]:
    """Return the ranges of the layers that have one, in the order of the file.

    Args:
        monitor: What QuantMonitor wrote.

    Example:
        >>> columns = {"clip_max": Series((0, 9), (2.0, 3.0)), "clip_min": Series((0, 9), (-2.0, -3.0))}
        >>> found = ranges({"fc": columns})[0]
        >>> found.moved, found.growth
        (0.5, 1.5)
    """
    found = []
    for layer, columns in monitor.items():
        upper, lower = (columns.get(name, Series()).finite() for name in ("clip_max", "clip_min"))
        below = dict(zip(lower.steps, lower.values, strict=True))
        points = [(s, v, below[s]) for s, v in zip(upper.steps, upper.values, strict=True) if s in below]
        if points:
            steps, uppers, lowers = zip(*points, strict=True)
            found.append(Range(layer, steps, uppers, lowers))
    return found


def most_moved(found: Sequence[Range], most: int = MOST_LAYERS) -> list[Range]:
    """Return the layers whose ranges have moved most, in the order given.

    Args:
        found: All layers.
        most: How many to return.
    """
    chosen = sorted(found, key=lambda item: -item.moved)[:most]
    return [item for item in found if item in chosen]


def draw_ranges(found: Sequence[Range], phases: list[Span], last: int) -> Figure:
    """Draw the range of each layer in a panel of its own.

    Args:
        found: The layers, not too many.
        phases: The phases to shade.
        last: The last step of the run.

    Returns:
        The figure.
    """
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = new_figure(1.55 * rows + 0.35, width=WIDTH * (0.5 if columns == 1 else 1))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for ax, item in zip(grid, found, strict=False):
        shade(ax, phases, last)
        draw_range(ax, item)
        ax.set_title(shorten(item.layer, 24), fontsize=8.5)
        ax.set_title(f"×{item.growth:.3g}", loc="right", fontsize=7.5, fontweight="normal", color=MUTED.light)
        ax.set_xlim(-0.02 * last, 1.02 * last)
        label_steps(ax, ticks=4)
    for place, ax in enumerate(grid):
        is_lowest = place + columns >= len(found)
        ax.tick_params(labelbottom=is_lowest)
        ax.set_xlabel("training step" if is_lowest else "")
    for ax in grid[len(found) :]:
        ax.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, columnspacing=1.4)
    return figure


def draw_range(ax: Axes, item: Range) -> None:
    """Draw both ends of the range of one layer.

    Args:
        ax: Where.
        item: The range.
    """
    every = slice(None, None, math.ceil(len(item.steps) / _MOST_POINTS))
    marker = "o" if len(item.steps) <= 3 else ""
    ax.plot(item.steps[every], item.upper[every], color=ORANGE.light, marker=marker, label="clip_max")
    ax.plot(item.steps[every], item.lower[every], color=BLUE.light, marker=marker, label="clip_min")
    ax.axhline(0, color=MUTED.light, lw=0.6, ls=":")
    ax.margins(y=0.12)


def draw_all_widths(found: Sequence[Range], last: int) -> Figure:
    """Draw the width of all ranges relative to the first one: a row per layer, a colour per change.

    Args:
        found: The layers.
        last: The last step of the run.

    Returns:
        The figure.
    """
    rows = _changes(found, last)
    limit = min(_MOST_CHANGE, max([_LEAST_CHANGE, *(abs(v) for row in rows for v in row if math.isfinite(v))]))
    height = min(0.165, 12 / len(found))
    figure = new_figure(height * len(found) + 0.75)
    ax = figure.subplots()
    image = ax.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap=colour_map(),
        vmin=-limit,
        vmax=limit,
        extent=(0, max(last, 1), len(found) - 0.5, -0.5),
    )
    label_rows(ax, [item.layer for item in found], height)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    label_steps(ax)
    _change_bar(figure, image, limit, shrink=min(1.0, 5 / (height * len(found))))
    return figure


def _changes(found: Sequence[Range], last: int) -> list[list[float]]:
    """Return the change of each width as a power of two, on a regular grid of steps; NaN before the first one."""
    rows = []
    for item in found:
        widths = [upper - lower for upper, lower in zip(item.upper, item.lower, strict=True)]
        row = []
        for cell in range(_CELLS):
            place = bisect_right(item.steps, (cell + 1) * max(last, 1) / _CELLS) - 1
            known = place >= 0 and widths[0] > 0 and widths[place] > 0
            row.append(math.log2(widths[place] / widths[0]) if known else math.nan)
        rows.append(row)
    return rows


def _change_bar(figure: Figure, image: Any, limit: float, shrink: float) -> None:
    bar = figure.colorbar(image, ax=image.axes, aspect=30, pad=0.015, shrink=shrink)
    ticks = [-limit, -limit / 2, 0.0, limit / 2, limit]
    bar.set_ticks(ticks, labels=[f"×{2**tick:.3g}" for tick in ticks])
    bar.set_label("width relative to the first one")
    bar.outline.set_visible(False)
