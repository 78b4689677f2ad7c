"""The figure of losses and accuracies over the training steps, with the phases of the quantization behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from amct_lightning.run_report.logs import Metrics, Series
from amct_lightning.run_report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PHASE_CALIBRATING,
    PHASE_FLOAT,
    PHASE_FROZEN,
    PHASE_LEARNING,
    PURPLE,
    Colour,
    label_steps,
    log_ticks,
    new_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES: Mapping[int, tuple[str, Colour]] = {
    0: ("float", PHASE_FLOAT),
    1: ("calibrating", PHASE_CALIBRATING),
    2: ("learning", PHASE_LEARNING),
    3: ("frozen", PHASE_FROZEN),
}
"""The values of the metric ``quant_phase``, in words and colours."""
_MOST_PANELS = 6
_MOST_SERIES = 8
_ROOM = 84
MOST_POINTS = 300
_STAGES = (("train", BLUE), ("val", ORANGE), ("test", GREEN))
_STAGE = re.compile(r"^(train(?:ing)?|val(?:id(?:ation)?)?|test)[_/. -]|[_/](?:step|epoch)$|/dataloader_idx_\d+", re.I)
OWN = ("quant_", "quant/")
"""What the metrics of the callback and of QuantMonitor begin with."""
_WIDE_RANGE = 30.0
_LABEL_SHARE = 0.11
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
        >>> spans(Series((9, 19, 29), (1.0, 2.0, 2.0)), 40)
        [Span(start=0, end=19, phase=1), Span(start=19, end=40, phase=2)]
    """
    found: list[Span] = []
    for step, value in zip(phases.steps, phases.values, strict=True):
        phase = int(value)
        if not found or found[-1].phase != phase:
            found.append(Span(step if found else start, end, phase))
    return [span._replace(end=later.start) for span, later in pairwise(found)] + found[-1:]


def panels(metrics: Metrics, most: int = _MOST_PANELS) -> dict[str, dict[str, Series]]:
    """Group metrics that belong in one panel: ``train_loss`` and ``val_loss`` in ``loss``.

    Args:
        metrics: The metrics.
        most: The number of panels that there is room for.

    Returns:
        The series to draw, by panel and name: the loss first, learning rates last, none without a finite value or of
        this package, and not more than can be told apart.

    Example:
        >>> point = Series((1,), (0.5,))
        >>> list(panels(Metrics({"val_acc": point, "train_loss_step": point, "val_loss": point, "lr-Adam": point})))
        ['loss', 'acc', 'lr-Adam']
    """
    found: dict[str, dict[str, Series]] = {}
    for name, series in metrics.series.items():
        if not name.startswith(OWN) and len(series.finite()):
            found.setdefault(_STAGE.sub("", _STAGE.sub("", name)) or name, {})[name] = series.finite()
    order = sorted(found, key=lambda title: (title.lower() != "loss", title.startswith("lr"), title))
    return {
        title: {name: found[title][name] for name in _by_stage(found[title])[:_MOST_SERIES]} for title in order[:most]
    }


def draw_curves(metrics: Metrics, phases: Series) -> Figure:
    """Draw the metrics, a panel for each kind, and a ribbon that names the phases.

    Args:
        metrics: The metrics; at least one must have something to draw.
        phases: The metric ``quant_phase``; may be empty.

    Returns:
        The figure.
    """
    drawn = panels(metrics)
    first, last = metrics.steps[0], max(metrics.steps[-1], metrics.steps[0] + 1)
    start = first if 2 * first > last else 0  # what was logged before a resumption may be lost
    found = spans(phases, last, start)
    lines = sum(len(series) // _legend_columns(series, _ROOM) for series in drawn.values())
    figure = new_figure(0.55 * bool(found) + 2.1 * len(drawn) + 0.17 * lines + 0.3)
    ratios = [0.12] * bool(found) + [1.0] * len(drawn)
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    if found:
        draw_ribbon(axes[0], found, last)
    for ax, (title, series) in zip(axes[bool(found) :], drawn.items(), strict=True):
        shade(ax, found, last)
        draw_panel(ax, title, series)
    margin = 0.015 * (last - start)
    axes[-1].set_xlim(start - margin, last + margin)
    label_steps(axes[-1])
    return figure


def draw_panel(ax: Axes, title: str, series: Mapping[str, Series], room: int = _ROOM) -> None:
    """Draw series that share a quantity; long ones as the mean and the range of neighbouring steps.

    Args:
        ax: Where.
        title: The quantity.
        series: The series by name, finite and not empty.
        room: Number of letters that the legend may be wide.
    """
    for name, (colour, style) in zip(_by_stage(series), _looks(series), strict=True):
        _draw_series(ax, shorten(name), series[name], colour, style)
    values = [value for s in series.values() for value in s.values]
    if _is_loss(title) and min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        ax.set_yscale("log")
        log_ticks(ax.yaxis, values)
    ax.margins(y=0.12)
    ax.set_title(shorten(title, 20))
    columns = _legend_columns(series, room)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=columns, columnspacing=1.4)


def _legend_columns(series: Mapping[str, Series], room: int) -> int:
    longest = max(len(shorten(name)) for name in series)
    return max(1, min(len(series), room // (longest + 6)))


def shade(ax: Axes, found: list[Span], last: int) -> None:
    """Shade the phases behind an axis; short ones are drawn wide enough to be seen.

    Args:
        ax: Where.
        found: The phases.
        last: The last step.
    """
    for span in found:
        width = max(span.end - span.start, _LEAST_SHARE * last)
        colour = PHASES.get(span.phase, ("", PHASE_FLOAT))[1]
        ax.axvspan(span.start, span.start + width, color=colour.light, lw=0, zorder=0.1 + 0.1 * (width < 0.05 * last))


def draw_ribbon(ax: Axes, found: list[Span], last: int, title: str = "phase of the quantization") -> None:
    """Name the phases on a narrow axis above the panels; those that are too short only in the legend.

    Args:
        ax: Where.
        found: The phases.
        last: The last step.
        title: Its title.
    """
    from matplotlib.patches import Patch  # noqa: PLC0415  # optional

    shade(ax, found, last)
    for span in found:
        if span.end - span.start > _LABEL_SHARE * (last - found[0].start):
            name = PHASES.get(span.phase, ("unknown", PHASE_FLOAT))[0]
            ax.text((span.start + span.end) / 2, 0.46, name, ha="center", va="center", fontsize=8, color=INK.light)
    ax.set_title(title)
    ax.set_yticks([])
    ax.grid(False)
    ax.tick_params(bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    present = [phase for phase in PHASES if any(span.phase == phase for span in found)]
    handles = [Patch(color=PHASES[phase][1].light, label=PHASES[phase][0], lw=0) for phase in present]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.15), ncols=4, columnspacing=1.4)


def _draw_series(ax: Axes, name: str, series: Series, colour: Colour, style: str) -> None:
    count = len(series)
    if count <= MOST_POINTS:
        marker = "o" if count <= 40 else ""
        ax.plot(series.steps, series.values, style, color=colour.light, marker=marker, markersize=3.2, label=name)
        return
    steps, means, lows, highs = thinned(series)
    ax.fill_between(steps, lows, highs, color=colour.light, alpha=0.22, lw=0)
    ax.plot(steps, means, style, color=colour.light, label=name)


def thinned(series: Series, most: int = MOST_POINTS) -> tuple[list[float], list[float], list[float], list[float]]:
    """Bring a long series to at most ``most`` points: step, mean, lowest and highest of neighbouring values.

    Args:
        series: The series, longer than ``most``.
        most: The number of points.

    Example:
        >>> thinned(Series((0, 1, 2, 3), (1.0, 3.0, 5.0, 5.0)), 2)
        ([0.5, 2.5], [2.0, 5.0], [1.0, 5.0], [3.0, 5.0])
    """
    edges = [len(series) * place // most for place in range(most + 1)]
    steps = [series.steps[a:b] for a, b in pairwise(edges)]
    values = [series.values[a:b] for a, b in pairwise(edges)]
    return (
        [sum(part) / len(part) for part in steps],
        [sum(part) / len(part) for part in values],
        [min(part) for part in values],
        [max(part) for part in values],
    )


def _by_stage(series: Mapping[str, Series]) -> list[str]:
    return sorted(series, key=lambda name: (_stage(name), name))


def _looks(series: Mapping[str, Series]) -> list[tuple[Colour, str]]:
    """Give each stage its colour, and several series of one stage different lines."""
    styles, seen = ("-", "--", ":", "-."), [0] * (len(_STAGES) + 1)
    looks = []
    for name in _by_stage(series):
        stage = _stage(name)
        colour = _STAGES[stage][1] if stage < len(_STAGES) else (PURPLE, MUTED)[seen[stage] // 4 % 2]
        looks.append((colour, styles[seen[stage] % len(styles)]))
        seen[stage] += 1
    return looks


def _stage(name: str) -> int:
    return next((place for place, (stage, _) in enumerate(_STAGES) if name.lower().startswith(stage)), len(_STAGES))


def _is_loss(title: str) -> bool:
    return "loss" in title.lower()
