"""The page: pictures with their descriptions, facts and numbers, filled into the templates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from amct_lightning.conversion.report import beside
from amct_lightning.conversion.report_rows import ReportRow
from amct_lightning.monitor_format import PHASE_METRIC, PHASES
from amct_lightning.run_report.curves import draw_curves, panels
from amct_lightning.run_report.layers import draw_layers, lowest_sqnr, quartiles, sqnr_changes, usable
from amct_lightning.run_report.logs import finite
from amct_lightning.run_report.ranges import draw_ranges, draw_widths, most_moved, ranges
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import COLOURS, MOST_ROWS, clean, drawing, inline_svg, new_figure, row_height
from amct_lightning.wording import cut_off

Picture = tuple[str, dict[str, str]]
"""Its name, and what the template needs of it."""
_MOST_PANELS = 4
_MOST_RANGES = 12
_MOST_METRICS = 8
_COLUMNS = 3


def page(run: Run) -> str:
    """Return the report as one HTML page.

    Args:
        run: What was found of a run.
    """
    environment = Environment(
        loader=PackageLoader("amct_lightning.run_report"),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, percent, float32, breakable, remarks, finite, usable, distribution, beside)
    environment.filters.update({function.__name__: function for function in filters})
    with drawing():
        pictures = dict(picture for draw in (_curves, _ranges, _sqnr, _scales) for picture in draw(run))
    template = environment.get_template("page.html")
    return template.render(
        run=run,
        pictures=pictures,
        facts=_facts(run),
        changes=sqnr_changes(run.monitor),
        colours=COLOURS,
        program=_program(),
    )


def number(value: float | str | None, digits: int = 4) -> str:
    """Show a number with few significant digits; what is text already stays.

    Example:
        >>> number(0.0123456), number(None), number(1234567.0), number(float("nan"))
        ('0.01235', '–', '1.235e+06', 'NaN')
    """
    if value is None:
        return "–"
    if isinstance(value, (str, int)):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """Show a share.

    Example:
        >>> percent(0.0625), percent(0.0)
        ('6.25 %', '0 %')
    """
    return number(value) if value is None or not math.isfinite(value) else f"{number(100 * value, 3)} %"


def float32(value: float | None) -> str:
    """Show a float32 number with as many digits as tell it from its neighbours, like the record file.

    Example:
        >>> float32(0.008161441423)
        '0.008161441'
    """
    return number(None) if value is None else str(np.float32(value))


def breakable(name: str) -> Markup:
    """Let a dotted name break behind its dots.

    Example:
        >>> breakable("layer.<1>")
        Markup('layer.<wbr>&lt;1&gt;')
    """
    return escape(clean(name)).replace(".", Markup(".<wbr>"))


def distribution(scales: list[float]) -> list[float | None]:
    """Return the number of weight scales, smallest, median, largest, largest / smallest, and how many are not usable.

    Example:
        >>> distribution([0.25, 0.5, 1.0, -1.0])
        [4, 0.25, 0.5, 1.0, 4.0, 1]
    """
    good = usable(scales)
    known = [min(good), quartiles(good)[1], max(good), max(good) / min(good)] if good else [None] * 4
    return [len(scales), *known, len(scales) - len(good)]


def remarks(row: ReportRow) -> str:
    """Say what is special about a quantized layer, or why it is in float."""
    said = ["input never negative"] if row.fixed_min else []
    said += [row.input] if row.input else []
    said += [f"shares its input with {cut_off(row.shares_with)}"] if row.shares_with else []
    return row.reason or "; ".join(said + ([f"called {row.calls} times"] if row.calls > 1 else []))


def _picture(name: str, height: float, draw: Callable[[Figure], None], alt: str, caption: str) -> Picture:
    figure = new_figure(height)
    draw(figure)
    return name, {"svg": Markup(inline_svg(figure, name, alt)), "caption": caption}


def _curves(run: Run) -> Iterator[Picture]:
    drawn = panels(run.logged, _MOST_PANELS)
    if not drawn:
        return
    names = [name for panel in drawn.values() for name in panel]
    words = [
        "Shaded: the phase of the layer that is least advanced, from the step on at which it was logged."
        if run.phases
        else f"The phases are not known: the metric {PHASE_METRIC}, which QuantRetrainCallback logs, is missing."
    ]
    if len(names) < len(run.logged):
        words.append(f"{len(names)} of {len(run.logged)} metrics; a logger shows all of them.")
    alt = f"Curves of {', '.join(names)} over {run.steps} training steps, with the phases of the quantization."
    yield _picture("curves", 2.1 * len(drawn) + 0.4, lambda part: draw_curves(part, run, drawn), alt, " ".join(words))


def _ranges(run: Run) -> Iterator[Picture]:
    found, moved = ranges(run.monitor), most_moved(run.monitor, _MOST_RANGES)
    if not found:
        return
    which = "All layers" if len(moved) == len(found) else f"The {len(moved)} of {len(found)} layers that moved most"
    alt = f"clip_max and clip_min over the steps: {', '.join(moved)}."
    caption = f"{which}; on the right of each title the last width as a multiple of the first."
    height = 1.55 * math.ceil(len(moved) / _COLUMNS) + 0.35
    yield _picture("ranges", height, lambda part: draw_ranges(part, run, moved, _COLUMNS), alt, caption)
    alt = f"Colours for the width of the range of {len(found)} layers over the steps; the ends are in the table below."
    caption = "All layers in the order of the file: red ranges have grown since the calibration, blue ones shrunk."
    height = row_height(len(found)) * len(found) + 0.95
    yield _picture("widths", height, lambda part: draw_widths(part, run, found), alt, caption)


def _sqnr(run: Run) -> Iterator[Picture]:
    changes = sqnr_changes(run.monitor)
    known = lowest_sqnr(changes, [*run.monitor], len(run.monitor))
    layers = lowest_sqnr(changes, known, MOST_ROWS)
    if not layers:
        return
    lowest = [(side, *min(found.items(), key=lambda item: item[1].after)) for side, found in changes.items() if found]
    said = " ".join(f"Lowest of the {side}: {layer} with {change.after:.1f} dB." for side, layer, change in lowest)
    which = "All layers" if layers == known else f"The {len(layers)} layers with the lowest values; the table has all"
    alt = f"SQNR before and after of {len(layers)} layers. {said}"
    height = row_height(len(layers)) * len(layers) + 0.95
    yield _picture("sqnr", height, lambda part: draw_layers(part, layers, changes, {}), alt, f"{which}. {said}")


def _scales(run: Run) -> Iterator[Picture]:
    scales = {name: usable(scales) for name, scales in run.scales.items() if usable(scales)}
    if not scales:
        return
    spreads = {name: max(values) / min(values) for name, values in scales.items()}
    widest = max(spreads, key=lambda name: spreads[name])
    alt = f"Distribution of the weight scales of {len(scales)} layers. Widest: {widest}."
    source = "checkpoint" if run.checkpoint and run.checkpoint.scales else "record"
    caption = f"Of the {source}. Widest: {widest}, largest / smallest = {number(spreads[widest], 3)}."
    height = row_height(len(scales)) * len(scales) + 0.95
    yield _picture("scales", height, lambda part: draw_layers(part, [*scales], {}, scales), alt, caption)


def _facts(run: Run) -> list[tuple[str, str, str]]:
    facts = []
    if run.changed:
        facts.append(("last change", f"{run.changed:%Y-%m-%d %H:%M}", "UTC, of the newest file"))
    if run.rows:
        bits = Counter(row.bits for row in run.rows if row.quantized)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bits.items()))
        facts.append(("quantized layers", f"{bits.total()} of {len(run.rows)}", kinds))
    elif run.monitor or run.record:
        facts.append(("quantized layers", str(len(run.record or run.monitor)), ""))
    if run.metrics:
        epochs = int(max([-1.0, *finite(run.metrics.get("epoch", {})).values()])) + 1
        facts.append(("training steps", str(run.steps), f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else ""))
    if run.phases:
        facts.append(("phase at the end", dict(enumerate(PHASES)).get(int([*run.phases.values()][-1]), "unknown"), ""))
    if run.checkpoint:
        known = (("epoch", run.checkpoint.epoch), ("step", run.checkpoint.step))
        where = ", ".join(f"{word} {value}" for word, value in known if value is not None)
        facts.append(("checkpoint", run.checkpoint.path.name, where))
    names = [name for name in run.logged if not name.startswith("lr")]
    names.sort(key=lambda name: not name.lower().startswith(("val", "test")))
    for name in names[:_MOST_METRICS]:
        step, value = [*run.logged[name].items()][-1]
        facts.append((name, number(value), f"at step {step}"))
    return facts


def _program() -> str:
    try:
        return f"amct-lightning {version('amct-lightning')}"
    except PackageNotFoundError:  # used from a source tree that is not installed
        return "amct-lightning"
