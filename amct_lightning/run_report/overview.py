"""An overview of a run in one picture, made of the pictures of the page."""

from __future__ import annotations

import io

from amct_lightning.run_report.curves import draw_curves, panels
from amct_lightning.run_report.layers import draw_layers, lowest_sqnr, sqnr_changes, usable
from amct_lightning.run_report.ranges import draw_ranges, most_moved
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.style import PAPER, drawing, new_figure

_WIDTH = 11.43
_MOST_ROWS = 22
_MOST_RANGES = 4
_MOST_PANELS = 2


def overview(run: Run, dpi: int) -> bytes:
    """Draw the curves, SQNR, the weight scales and the ranges that moved most, as far as they are known.

    Args:
        run: What was found of a run.
        dpi: Dots per inch.

    Returns:
        The picture as PNG.

    Raises:
        FileNotFoundError: If there is nothing to draw.
    """
    curves = panels(run.logged, _MOST_PANELS)
    changes = sqnr_changes(run.monitor)
    layers = lowest_sqnr(changes, [*run.monitor], _MOST_ROWS) or list(run.scales)[:_MOST_ROWS]
    if not curves and not layers:
        raise FileNotFoundError(f"'{run.source}' holds nothing to draw: no metrics, no SQNR and no weight scales.")
    scales = {name: usable(run.scales[name]) for name in layers if usable(run.scales.get(name, []))}
    moved = most_moved(run.monitor, _MOST_RANGES)
    with drawing():
        figure = new_figure(6.8 if moved else 4.9, _WIDTH)
        rows = figure.subfigures(1 + bool(moved), 1, height_ratios=(2.5, 1)[: 1 + bool(moved)], squeeze=False)
        above, *below = rows[:, 0]
        left, *right = above.subfigures(1, bool(curves) + bool(layers), squeeze=False, wspace=0.03)[0]
        if curves:
            draw_curves(left, run, curves)
        if layers:
            draw_layers((right or [left])[0], layers, changes, scales, length=22)
        if moved:
            draw_ranges(below[0], run, moved, len(moved))
        buffer = io.BytesIO()
        figure.savefig(
            buffer,
            format="png",
            dpi=dpi,
            facecolor=PAPER.light,
            bbox_inches="tight",
            pad_inches=0.12,
            metadata={"Software": None},
            pil_kwargs={"optimize": True},
        )
    return buffer.getvalue()
