"""The pictures of the activation ranges over the training steps: the layers that moved most, and all layers at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure, FigureBase

from amct_lightning.run_report.curves import shade
from amct_lightning.run_report.logs import Columns, Monitor, Series, all_steps, finite
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import BLUE, MUTED, ORANGE, label_rows, label_steps, shorten

_ENDS = "clip_max", "clip_min"
_LEAST_CHANGE = 0.05
"""The colours span at least this change of the width, as a power of two, so that noise does not look like drift."""
_MOST_CHANGE = 3.0
_FIVE_TICKS = 4
"""The rows that make a colour bar high enough for five ticks."""


Range = Columns
"""``clip_max``, ``clip_min`` and their distance, ``width``, at the steps at which both are known; at least one."""


def ranges(monitor: Monitor) -> dict[str, Range]:
    """Return the ranges of the layers that have one, in the order of the file.

    Args:
        monitor: What QuantMonitor wrote.

    Example:
        >>> ranges({"fc": {"clip_max": {0: 2.0, 9: 3.0}, "clip_min": {0: -2.0, 9: -3.0}}})["fc"]["width"]
        {0: 4.0, 9: 6.0}
    """
    found = {}
    for layer, columns in monitor.items():
        upper, lower = (finite(columns.get(name, {})) for name in _ENDS)
        both = {step: (value, lower[step]) for step, value in upper.items() if step in lower}
        if both:
            parts = {name: {step: ends[place] for step, ends in both.items()} for place, name in enumerate(_ENDS)}
            found[layer] = {**parts, "width": {step: high - low for step, (high, low) in both.items()}}
    return found


def most_moved(monitor: Monitor, most: int) -> dict[str, Range]:
    """Return the ranges that have drifted most since their calibration, in the order of the file."""
    found = ranges(monitor)
    drifts = {layer: [0.0, *finite(monitor[layer].get("clip_drift", {})).values()][-1] for layer in found}
    chosen = sorted(found, key=lambda layer: -drifts[layer])[:most]
    return {layer: item for layer, item in found.items() if layer in chosen}


def relative(width: Series) -> Series:
    """Return widths as powers of 2 of the first one; those that are none are left out."""
    first = next(iter(width.values()))
    return {step: math.log2(value / first) for step, value in width.items() if value > 0 and first > 0}


def draw_ranges(part: FigureBase, run: Run, found: Mapping[str, Range], columns: int) -> None:
    """Draw both ends of the range of each layer in a panel of its own.

    Args:
        part: Where.
        run: The run.
        found: The ranges by layer, not too many.
        columns: The number of panels beside each other.
    """
    rows = math.ceil(len(found) / columns)
    grid = part.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for place, (ax, (layer, item)) in enumerate(zip(grid, found.items(), strict=False)):
        shade(ax, run)
        marker = "o" if len(item["width"]) <= 3 else ""
        for name, colour in zip(_ENDS, (ORANGE, BLUE), strict=True):
            ax.plot([*item[name]], [*item[name].values()], color=colour.light, marker=marker, label=f"range: {name}")
        ax.axhline(0, color=MUTED.light, lw=0.6, ls=":")
        ax.margins(y=0.12)
        ax.set_title(shorten(layer, 24), fontsize=8.5)
        growth = 2 ** [math.nan, *relative(item["width"]).values()][-1]
        ax.set_title(f"×{growth:.3g}", loc="right", fontsize=7.5, fontweight="normal", color=MUTED.light)
        label_steps(ax, run.steps, ticks=4)
        is_lowest = place + columns >= len(found)
        ax.tick_params(labelbottom=is_lowest)
        ax.xaxis.label.set_visible(is_lowest)
    for ax in grid[len(found) :]:
        ax.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=2)


def draw_widths(figure: Figure, run: Run, found: Mapping[str, Range]) -> None:
    """Draw the width of all ranges relative to the first one: a row per layer, a colour per change.

    Args:
        figure: Where.
        run: The run.
        found: The ranges by layer.
    """
    steps = all_steps(found.values())
    rows = [
        [changes.get(step, math.nan) for step in steps] for changes in (relative(r["width"]) for r in found.values())
    ]
    limit = min(_MOST_CHANGE, max([_LEAST_CHANGE, *(abs(v) for row in rows for v in row if math.isfinite(v))]))
    ax = figure.subplots()
    edges = [*steps, max(run.steps, steps[-1] + 1)]  # a width counts until the next one is known
    places = [place - 0.5 for place in range(len(found) + 1)]
    image = ax.pcolormesh(edges, places, rows, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True)
    label_rows(ax, [*found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    label_steps(ax, run.steps)
    bar = figure.colorbar(image, ax=ax, aspect=30, pad=0.015)
    ticks = [-limit, 0.0, limit] if len(found) < _FIVE_TICKS else [-limit, -limit / 2, 0.0, limit / 2, limit]
    bar.set_ticks(ticks, labels=[f"×{2**tick:.3g}" for tick in ticks])
    # Above and not along the bar, which is shorter than these words if there are few layers.
    ax.set_title("width relative to the first one", loc="right", fontsize=8.5, fontweight="normal", color=MUTED.light)
