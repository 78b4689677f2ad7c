"""The sections of the report: what each shows, how to read it, and how to get what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amct_lightning.run_report import tables
from amct_lightning.run_report.curves import MOST_POINTS, OWN, draw_curves, panels, spans
from amct_lightning.run_report.layers import SIDES, changes, draw_scales, draw_sqnr, sqnr_rows
from amct_lightning.run_report.logs import Series
from amct_lightning.run_report.ranges import draw_all_widths, draw_ranges, most_moved, ranges
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.svg import inline_svg
from amct_lightning.run_report.tables import number, text
from amct_lightning.wording import abbreviated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ADD_MONITOR = "add QuantMonitor() to the Trainer's callbacks, after QuantRetrainCallback, and report its log folder."


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: Its id.
        title: Its title.
        reading: How to read it and what would be bad.
        body: HTML; empty if there is nothing to show.
        missing: What to do to get it.
    """

    key: str
    title: str
    reading: str
    body: str
    missing: str

    def html(self) -> str:
        """Return the section as HTML."""
        shown = f"<p>{text(self.reading)}</p>\n{self.body}"
        missing = f'<p class="missing">{text(self.missing)}</p>'
        inside = shown if self.body else missing
        return f'<section id="{self.key}"><h2>{text(self.title)}</h2>\n{inside}\n</section>'


def all_sections(run: Run) -> list[Section]:
    """Make the sections of a run; call it with the settings of ``style.drawing``.

    Args:
        run: What was found.
    """
    makers: tuple[Callable[[Run], Section], ...] = (_curves, _ranges, _sqnr, _intervals, _scales, _conversion, _record)
    return [make(run) for make in makers]


def _figure(figure: Figure, name: str, alt: str, caption: str) -> str:
    return f"<figure>{inline_svg(figure, name, alt)}<figcaption>{text(caption)}</figcaption></figure>"


def _curves(run: Run) -> Section:
    drawn = {name: series for panel in panels(run.metrics).values() for name, series in panel.items()}
    logged = [name for name, series in run.metrics.series.items() if len(series) and not name.startswith(OWN)]
    body = ""
    if drawn:
        alt = f"Curves of {', '.join(drawn)} over {run.last_step} training steps; the table below has the numbers."
        caption = _curves_caption(run, drawn, [name for name in logged if name not in drawn])
        body = _figure(draw_curves(run.metrics, run.phases), "curves", alt, caption)
    if logged:
        body += _nonfinite(run) + tables.metric_table(run.metrics)
    remedy = "call self.log in the LightningModule" if run.metrics.series else "use CSVLogger as the Trainer's logger"
    return Section(
        "curves",
        "Loss and accuracy",
        "A small step down where quantization begins is normal, and retraining should make up for it. Bad: a loss that "
        "stays above its value before quantization, or one that jumps where factors freeze.",
        body,
        f"There are no metrics. {_what_to_do(run, f'{remedy}.')}",
    )


def _curves_caption(run: Run, drawn: dict[str, Series], left_out: list[str]) -> str:
    words = []
    if len(run.phases):
        words.append("Shaded: the phase of the layer that is least advanced, from the step on at which it was logged.")
    else:
        words.append("The phases are not known: the metric quant_phase, which QuantRetrainCallback logs, is missing.")
    if any(len(series) > MOST_POINTS for series in drawn.values()):
        words.append("Long curves are drawn as the mean of neighbouring steps, with their lowest and highest value.")
    if left_out:
        words.append(f"Only in the table: {abbreviated(left_out)}.")
    return " ".join(words)


def _nonfinite(run: Run) -> str:
    lines = []
    for name, series in run.metrics.series.items():
        bad = len(series) - len(series.finite())
        if bad:
            first = next(s for s in series.steps if s not in set(series.finite().steps))
            lines.append(f"{name}: {bad} of {len(series)} values are NaN or infinite, the first at step {first}.")
    return "".join(f'<p class="note">{text(line)}</p>' for line in lines)


def _ranges(run: Run) -> Section:
    found, last = ranges(run.monitor), run.last_step
    body = ""
    if found:
        moved = most_moved(found)
        most = max(moved, key=lambda item: item.moved)
        which = "All layers" if len(moved) == len(found) else f"The {len(moved)} of {len(found)} layers that moved most"
        alt = f"clip_max and clip_min over the steps: {', '.join(item.layer for item in moved)}."
        caption = f"{which}; on the right of each title the last width as a multiple of the first."
        body = _figure(draw_ranges(moved, spans(run.phases, last), last), "ranges", alt, caption)
        alt = f"Colours for the width of the range of {len(found)} layers over the steps. Moved most: {most.layer}."
        caption = (
            "All layers in the order of the file: orange ranges have grown since the calibration, blue ones shrunk; "
            "blank before it."
        )
        body += _figure(draw_all_widths(found, last), "widths", alt, caption)
    return Section(
        "ranges",
        "Activation ranges",
        "The two ends of each range are learned after the calibration. They should settle. Bad: a range that still "
        "moves when training ends, that collapses towards zero, or that grows without end.",
        body,
        f"There are no trajectories. {_what_to_do(run, _ADD_MONITOR)}",
    )


def _sqnr(run: Run) -> Section:
    layers = sqnr_rows(run.monitor)
    body = ""
    if layers:
        lowest = [_lowest(run, column, part) for column, part in SIDES if changes(run.monitor, column)]
        everything = len(layers) == len({layer for column, _ in SIDES for layer in changes(run.monitor, column)})
        which = "All layers" if everything else f"The {len(layers)} layers with the lowest values; the table has all"
        alt = f"SQNR before and after of {len(layers)} layers. {' '.join(lowest)}"
        figure = draw_sqnr(run.monitor, layers)
        body = _figure(figure, "sqnr", alt, f"{which}. {' '.join(lowest)}") + tables.sqnr_table(run.monitor)
    return Section(
        "sqnr",
        "SQNR by layer",
        "The signal to quantization noise ratio in the first interval after the calibration (before) and in the last "
        "one (after): 6 dB less is twice the error. Compare layers of the same bits; training may lower the SQNR of a "
        "layer and still raise the accuracy. Bad: single layers far below the rest; give these more bits (INT16 "
        "activations, INT8 weights) or leave them in float.",
        body,
        f"SQNR is not known. {_what_to_do(run, _ADD_MONITOR)}",
    )


def _lowest(run: Run, column: str, part: str) -> str:
    layer, change = min(changes(run.monitor, column).items(), key=lambda item: item[1].after)
    return f"Lowest of the {part}: {layer} with {change.after:.1f} dB."


def _intervals(run: Run) -> Section:
    return Section(
        "layers",
        "Each layer at the end",
        "Clipped values are lost, levels that are not in use are wasted; learning balances both. Bad: more than a few "
        "percent clipped, or only few levels in use.",
        tables.monitor_table(run.monitor) if run.monitor else "",
        f"The state of the layers is not known. {_what_to_do(run, _ADD_MONITOR)}",
    )


def _scales(run: Run) -> Section:
    scales = run.scales
    usable = {name: scale for name, scale in scales.items() if scale.count > scale.unusable}
    body = ""
    if usable:
        widest = max(usable, key=lambda name: usable[name].spread)
        alt = f"Distribution of the weight scales of {len(usable)} layers. Widest: {widest}."
        caption = (
            f"{'Of the checkpoint' if run.checkpoint and run.checkpoint.scales else 'Of the record'}. Widest: "
            f"{widest}, largest / smallest = {number(usable[widest].spread, 3)}."
        )
        body = _figure(draw_scales(usable), "scales", alt, caption)
    unusable = [name for name, scale in scales.items() if scale.unusable]
    if unusable:
        said = f"Scales that are not above 0 or not finite, which no record can hold: {', '.join(unusable)}."
        body += f'<p class="note">{text(said)}</p>'
    return Section(
        "scales",
        "Weight scales",
        "One scale per output channel, or a single one (a dot). Bad: scales of one layer that lie decades apart, which "
        "learned scales (ulq_retrain) may drift into; try a smaller quant_lr_scale.",
        body + tables.scale_table(scales) if scales else "",
        "The weight scales are not known. Let a ModelCheckpoint save checkpoints in the folder of the run.",
    )


def _conversion(run: Run) -> Section:
    return Section(
        "conversion",
        "Conversion",
        "Quantized layers in the order in which they run, then those in float, with the reason. Bad: a large layer in "
        "float that you wanted quantized, or a BatchNorm behind a convolution that is not folded.",
        tables.conversion_table(run.rows) if run.rows else "",
        "The plan of the conversion is not known. It is in the checkpoints of a training with QuantRetrainCallback: "
        "let a ModelCheckpoint save them in the folder of the run, or report such a checkpoint.",
    )


def _record(run: Run) -> Section:
    return Section(
        "record",
        "Record",
        f"The factors that the Ascend tools read, from {run.record_source}; scale_w with the BatchNorm folded in. Bad: "
        "factors that differ much from those of a run that was good.",
        tables.record_table(run.record) if run.record else "",
        "There is no record yet. It is written with each checkpoint after the calibration, and when training ends.",
    )


def _what_to_do(run: Run, remedy: str) -> str:
    if run.source.is_file():
        return "A checkpoint does not hold them; report the folder of the run."
    return f"To get them, {remedy}"
