"""Results as a picture: for each network the time of a step and the bytes kept for backward, as ratios to float."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from amct_lightning.files import atomic_path
from tests.benchmarks.bench.results import Measured, NetworkResults, Results
from tests.benchmarks.bench.variants import COMPILED, FP32, variants

COLOURS = ("#1f5fa8", "#3f8fd9", "#7bb8ee", "#0b3c6d")
OTHERS = ("#8c6d1f", "#b08a32", "#c9ab62", "#ddc998")
FLOAT = "#9a9a9a"
BAR, GAP = 0.19, 1.1


def draw(results: Results, path: Path) -> None:
    """Write the picture; the ending of the file decides on its form."""
    networks = [network for network in results.networks if _shown(network)]
    heights = [1.2 + len(_shown(network)) for network in networks]
    height = GAP + sum(heights) * 2 * BAR
    figure = Figure(figsize=(10, height + 1), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 2))
    for (times, bytes_kept), network in zip(panels, networks, strict=True):
        _draw_times(times, network)
        _draw_bytes(bytes_kept, network)
    threads = [timing.threads for timing in networks[0].measured[0].timings]
    by_threads = f"left, from top to bottom, in {' and '.join(map(str, threads))} threads" if threads[1:] else "left"
    figure.suptitle(
        f"Training step in parts of FP32's: wall clock ({by_threads}) and memory", fontsize=12, fontweight="bold"
    )
    text = f"Medians of {results.rounds} rounds, whiskers are quartiles. {results.machine}"
    figure.supxlabel("\n".join(textwrap.wrap(text, 130)), fontsize=8, color="#444444")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))


def _shown(network: NetworkResults) -> list[Measured]:
    return [each for each in network.measured if each.timings and each.variant != FP32]


def _colour(name: str) -> str:
    """One colour for a variant on all networks, compiled or not; those of this package are blue."""
    known, plain = variants(), name.partition(COMPILED)[0]
    for colours, is_own in ((COLOURS, True), (OTHERS, False)):
        names = [each for each, way in known.items() if way.is_own is is_own and each != FP32]
        if plain in names:
            return colours[names.index(plain) % len(colours)]
    return FLOAT


def _draw_times(axes: Any, network: NetworkResults) -> None:
    shown = _shown(network)
    counts = [timing.threads for timing in shown[0].timings]
    for row, each in enumerate(shown):
        for number, timing in enumerate(each.timings):
            ratio = timing.ratios[FP32].wall
            place = row + (number - (len(counts) - 1) / 2) * 0.8 / len(counts)
            axes.barh(
                place,
                ratio.median,
                height=0.74 / len(counts),
                color=_colour(each.variant),
                alpha=1 - 0.4 * number / max(1, len(counts) - 1),
                xerr=[[ratio.median - ratio.low], [ratio.high - ratio.median]],
                error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "#333333"},
            )
            axes.annotate(
                f"{ratio.median:.2f}", (ratio.high, place), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_title(network.title, fontsize=9, loc="left")
    _finish(axes, shown)


def _draw_bytes(axes: Any, network: NetworkResults) -> None:
    shown = _shown(network)
    for row, each in enumerate(shown):
        if each.facts is None:
            continue
        ratio = each.facts.kept_bytes / network.float_facts.kept_bytes
        axes.barh(row, ratio, height=0.5, color=_colour(each.variant))
        axes.annotate(f"{ratio:.2f}", (ratio, row), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_title("bytes kept for backward", fontsize=9, loc="left")
    _finish(axes, shown)
    axes.set_yticklabels([])


def _finish(axes: Any, shown: list[Measured]) -> None:
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [each.title for each in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
