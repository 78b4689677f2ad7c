"""The look of the pictures: colours that everyone can tell apart, light and dark; matplotlib's settings; SVG of a page.

Needs matplotlib, as every file that draws.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

_WIDTH = 9.2
MOST_ROWS = 60
"""More layers than these make the rows of a figure lower."""

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


class Colour(NamedTuple):
    """A colour that stands for one thing in all figures.

    Attributes:
        name: Name of the CSS variable.
        light: Its value on white paper; matplotlib draws with it.
        dark: Its value on a dark page.
    """

    name: str
    light: str
    dark: str


# Series: Okabe and Ito's palette, made lighter for dark pages. Phases: pale, in four different lightnesses.
INK = Colour("ink", "#1f2328", "#e6edf3")
MUTED = Colour("muted", "#59636e", "#9aa4b0")
GRID = Colour("grid", "#e1e4e8", "#2d333b")
PAPER = Colour("paper", "#ffffff", "#14181d")
BLUE = Colour("blue", "#0072b2", "#58b4ec")
ORANGE = Colour("orange", "#d55e00", "#ff9a52")
GREEN = Colour("green", "#009e73", "#3fd0a4")
PURPLE = Colour("purple", "#aa4a8a", "#e391c6")
PHASE_COLOURS = (
    Colour("phase-float", "#dfe2e6", "#3b424b"),
    Colour("phase-calibrating", "#ffd166", "#8a6a12"),
    Colour("phase-learning", "#e8f3fb", "#17293a"),
    Colour("phase-frozen", "#d6d1ec", "#443c6b"),
)
COLOURS = (INK, MUTED, GRID, PAPER, BLUE, ORANGE, GREEN, PURPLE, *PHASE_COLOURS)

_STYLE = Path(__file__).with_name("templates") / "report.mplstyle"
_SETTINGS = {
    "text.color": INK.light,
    "axes.labelcolor": MUTED.light,
    "axes.edgecolor": MUTED.light,
    "grid.color": GRID.light,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the settings of the report, whatever a user's matplotlibrc says."""
    with matplotlib.style.context([str(_STYLE), _SETTINGS], after_reset=True), warnings.catch_warnings():
        # The browser has the glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(height: float, width: float = _WIDTH) -> Figure:
    """Return an empty figure that belongs to no window; its size is in inches, which a page scales."""
    return Figure(figsize=(width, height))


def label_steps(ax: Axes, last: int, start: int = 0, ticks: int = 7) -> None:
    """Give an axis of training steps its ends, its label and few, whole ticks."""
    margin = 0.015 * (last - start)
    ax.set_xlim(start - margin, last + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("training step")


def log_ticks(axis: Axis, values: Sequence[float], most: int = 9) -> None:
    """Give a logarithmic axis two or more labelled ticks, however narrow the range of its values, but not too many."""
    decades = math.log10(max(values) / min(values))
    choices = tuple(map(float, range(1, 10))), (1.0, 2.0, 5.0), (1.0,)
    steps = next((steps for steps in choices if (decades + 0.4) * len(steps) <= most), (1.0,))
    axis.set_major_locator(LogLocator(subs=steps, numticks=most))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def row_height(count: int) -> float:
    """Return the height in inches of each row of a figure with many rows.

    Example:
        >>> row_height(20), row_height(100), row_height(1000)
        (0.17, 0.125, 0.02)
    """
    return 0.17 if count <= MOST_ROWS else min(0.125, 20 / count)


def label_rows(ax: Axes, names: Sequence[str], length: int = 30) -> None:
    """Name the rows of a figure, from the top; every second, third, ... if they are too low for all names."""
    every = max(1, math.ceil(0.12 / row_height(len(names))))
    ax.set_yticks(range(0, len(names), every), [shorten(name, length) for name in names[::every]], fontsize=7.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", lw=0.4)


def clean(name: str) -> str:
    r"""Replace characters that neither XML nor a line of text can hold.

    Example:
        >>> clean("layer\x00.1\n")
        'layer�.1�'
    """
    return "".join(char if char.isprintable() else "\ufffd" for char in name)


def shorten(name: str, length: int = 30) -> str:
    """Shorten a long dotted name from its front, whole components if possible: the end tells layers apart.

    Example:
        >>> shorten("model.encoder.layers.11.self_attn.q_proj")
        '…layers.11.self_attn.q_proj'
        >>> shorten("a" * 40, 8)
        '…aaaaaaa'
    """
    name = clean(name)
    if len(name) <= length:
        return name
    tail = name[1 - length :]
    _, _, whole = tail.partition(".")
    return f"…{whole if len(whole) * 2 > length else tail}"


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an ``<svg>`` element: with CSS variables for its colours, and ids that no other figure has.

    Args:
        figure: The figure.
        name: A word that no other figure on the page has.
        alt: What the figure shows, for those who do not see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())  # matplotlib's own output
    variables = {colour.light: f"var(--{colour.name})" for colour in COLOURS}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            local = re.sub(r"^(?=.)" if key == "id" else r"(?<=^#)|(?<=url\(#)", f"{name}-", value)
            element.set(key, re.sub("#[0-9a-f]{6}", lambda at: variables.get(at[0], at[0]), local))
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": clean(alt)}
    return ElementTree.tostring(root, encoding="unicode")
