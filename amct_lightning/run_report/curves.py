"""The phases of the quantization behind every axis of steps, and the losses and accuracies in front of them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

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
_LEAST_SHARE = 0.004
"""A phase of a single step is drawn this wide, as a share of the axis."""


class Span(NamedTuple):
    """A phase from one step to another."""

    start: int
    end: int
    phase: int


def spans(phases: Series, end: int, start: int = 0) -> list[Span]:
    """Join logged phases to spans; each value counts from its step on, the first one from the start.

    Args:
        phases: The metric ``quant_phase``.
        end: The last step of the run.
        start: The first step that is shown.

    Example:
        >>> spans({9: 1.0, 19: 2.0, 29: 2.0}, 40)
        [Span(start=0, end=19, phase=1), Span(start=19, end=40, phase=2)]
    """
    found: list[Span] = []
    for step, value in phases.items():
        if int(value) in range(len(PHASES)) and (not found or found[-1].phase != value):
            found.append(Span(step if found else start, end, int(value)))
    return [span._replace(end=later.start) for span, later in pairwise(found)] + found[-1:]


def shade(ax: Axes, found: list[Span]) -> list[Patch]:
    """Shade the phases behind an axis of steps, short ones wide enough to be seen.

    Args:
        ax: Where.
        found: The phases.

    Returns:
        What to show in a legend.
    """
    least = _LEAST_SHARE * found[-1].end if found else 0.0
    for span in sorted(found, key=lambda span: span.start - span.end):
        width = max(span.end - span.start, least)
        ax.axvspan(span.start, span.start + width, color=PHASE_COLOURS[span.phase].light, lw=0, zorder=0.1)
    present = sorted({span.phase for span in found})
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
    found = spans(run.phases, last, start)
    axes = part.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, series) in zip(axes, drawn.items(), strict=True):
        phases = shade(ax, found)
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
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2)
