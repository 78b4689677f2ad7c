"""The phases of the quantization behind every axis of steps, and the losses and accuracies in front of them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch

from amct_lightning.monitor_format import PHASES
from amct_lightning.run_report.logs import Columns, Series, finite
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import (
    BLUE,
    GREEN,
    ORANGE,
    PHASE_COLOURS,
    PURPLE,
    Colour,
    label_steps,
    log_ticks,
    shorten,
)

_MOST_SERIES = 4
_STAGES = (("train", BLUE), ("val", ORANGE), ("test", GREEN))
_STAGE = re.compile(r"^(train(?:ing)?|val(?:id(?:ation)?)?|test)[_/. -]|[_/](?:step|epoch)$|/dataloader_idx_\d+", re.I)
_LINES = ("-", "--", ":", "-.")
_WIDE_RANGE = 30.0
_LONG_NAME = 16
_LEAST_SHARE = 0.004
"""A phase of a single step is drawn this wide, as a share of the axis."""


def spans(phases: Series, start: int, end: int) -> list[tuple[int, int, int]]:
    """Join logged phases to (start, end, phase); each value counts from its step on, the first one from the start.

    Args:
        phases: The metric ``quant_phase``.
        start: The first step that is shown.
        end: The last one.

    Example:
        >>> spans({9: 1.0, 19: 2.0, 29: 2.0}, 0, 40)
        [(0, 19, 1), (19, 40, 2)]
    """
    known = {step: int(phase) for step, phase in phases.items() if int(phase) in range(len(PHASES))}
    begun = [(next(steps), phase) for phase, steps in groupby(known, key=lambda step: known[step])]
    starts = [start, *(step for step, _ in begun[1:]), end]
    return [(starts[place], starts[place + 1], phase) for place, (_, phase) in enumerate(begun)]


def shade(ax: Axes, run: Run, start: int = 0) -> list[Patch]:
    """Shade the phases behind an axis of steps, short ones wide enough to be seen.

    Args:
        ax: Where.
        run: The run.
        start: The first step that is shown.

    Returns:
        What to show in a legend.
    """
    found = sorted(spans(run.phases, start, run.steps), key=lambda span: span[0] - span[1])
    for begin, end, phase in found:
        width = max(end - begin, _LEAST_SHARE * run.steps)
        ax.axvspan(begin, begin + width, color=PHASE_COLOURS[phase].light, lw=0, zorder=0.1)
    present = sorted({phase for _, _, phase in found})
    return [Patch(color=PHASE_COLOURS[phase].light, label=PHASES[phase], lw=0) for phase in present]


def panels(logged: Columns, most: int) -> dict[str, Columns]:
    """Group metrics that belong in one panel: ``train_loss`` and ``val_loss`` in ``loss``.

    Learning rates are left to the loggers; what is drawn here is what the phases of the quantization do to.

    Args:
        logged: The metrics.
        most: The number of panels that there is room for.

    Returns:
        The series to draw, by panel and name: the loss first, none without a finite value.

    Example:
        >>> point = {1: 0.5}
        >>> list(panels({"val_acc": point, "train_loss_step": point, "val_loss": point, "lr-Adam": point}, 4))
        ['loss', 'acc']
    """
    found: dict[str, Columns] = {}
    for name in sorted(logged, key=lambda name: (not name.startswith("train"), name)):
        points = finite(logged[name])
        if points and not name.startswith("lr"):
            panel = found.setdefault(_STAGE.sub("", _STAGE.sub("", name)) or name, {})
            if len(panel) < _MOST_SERIES:
                panel[name] = points
    order = sorted(found, key=lambda title: (title.lower() != "loss", title))
    return {title: found[title] for title in order[:most]}


def draw_curves(part: FigureBase, run: Run, drawn: dict[str, Columns]) -> None:
    """Draw metrics, a panel for each quantity, over the shaded phases.

    Args:
        part: Where.
        run: The run.
        drawn: The metrics by panel, at least one.
    """
    first, last = min(step for panel in drawn.values() for s in panel.values() for step in s), run.steps
    start = first if 2 * first > last else 0  # what was logged before a resumption may be lost
    axes = part.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, series) in zip(axes, drawn.items(), strict=True):
        phases = shade(ax, run, start)
        _draw_panel(ax, title, series)
    label_steps(axes[-1], last, start)
    if phases:
        part.legend(handles=phases, loc="outside upper right", ncols=len(phases))


def _draw_panel(ax: Axes, title: str, series: Columns) -> None:
    """Draw series that share a quantity."""
    seen: Counter[Colour] = Counter()
    for name, points in series.items():
        colour = next((colour for stage, colour in _STAGES if name.lower().startswith(stage)), PURPLE)
        look: dict[str, Any] = {"marker": "o" if len(points) <= 40 else "", "markersize": 3.2, "label": shorten(name)}
        ax.plot([*points], [*points.values()], _LINES[seen[colour]], color=colour.light, **look)
        seen[colour] += 1
    values = [value for points in series.values() for value in points.values()]
    if "loss" in title.lower() and min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        ax.set_yscale("log")
        log_ticks(ax.yaxis, values)
    ax.margins(y=0.12)
    ax.set_title(shorten(title, 20))
    fits = max(map(len, series)) < _LONG_NAME
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2 if fits else 1)
