"""The look of the figures: colours that everyone can tell apart, in a light and a dark form; matplotlib's settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH = 9.2
"""Width of a figure in inches; the page scales it."""


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
PHASE_FLOAT = Colour("phase-float", "#dfe2e6", "#3b424b")
PHASE_CALIBRATING = Colour("phase-calibrating", "#ffd166", "#8a6a12")
PHASE_LEARNING = Colour("phase-learning", "#e8f3fb", "#17293a")
PHASE_FROZEN = Colour("phase-frozen", "#d6d1ec", "#443c6b")
COLOURS = (
    INK,
    MUTED,
    GRID,
    PAPER,
    BLUE,
    ORANGE,
    GREEN,
    PURPLE,
    PHASE_FLOAT,
    PHASE_CALIBRATING,
    PHASE_LEARNING,
    PHASE_FROZEN,
)


def _settings() -> dict[str, Any]:
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.color": INK.light,
        "text.parse_math": False,  # a dollar in a layer's name is a dollar
        "axes.unicode_minus": True,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": 8.5,
        "axes.labelcolor": MUTED.light,
        "axes.edgecolor": MUTED.light,
        "axes.facecolor": "none",
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID.light,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED.light,
        "ytick.color": MUTED.light,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 2.0,
        "legend.borderaxespad": 0,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "figure.facecolor": "none",
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.07,
        "figure.constrained_layout.h_pad": 0.06,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "amct-lightning",  # fixed, so that equal figures are equal files
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the settings of the report, whatever a user's matplotlibrc says.

    Raises:
        ImportError: If matplotlib is not installed, with what to do.
    """
    try:
        import matplotlib  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise ImportError(
            "A report needs matplotlib, which is not installed. Install it with: pip install matplotlib "
            "(or the extra: pip install 'amct-lightning[report]')."
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for name, value in _settings().items():
            matplotlib.rcParams[name] = value  # type: ignore[index]  # its stubs know only literal names
        # The browser has the glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure that belongs to no window.

    Args:
        height: In inches.
        width: In inches.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional

    return Figure(figsize=(width, height))


def label_steps(ax: Axes, ticks: int = 7) -> None:
    """Give an axis of training steps its label and few, whole ticks."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  # optional

    ax.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))
    ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    ax.set_xlabel("training step")


def log_ticks(axis: Axis, values: Sequence[float], most: int = 9) -> None:
    """Give a logarithmic axis two or more labelled ticks, however narrow the range of its values, but not too many."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415  # optional

    decades = math.log10(max(values) / min(values))
    choices = tuple(map(float, range(1, 10))), (1.0, 2.0, 5.0), (1.0,)
    steps = next((steps for steps in choices if (decades + 0.4) * len(steps) <= most), (1.0,))
    axis.set_major_locator(LogLocator(subs=steps, numticks=most))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def colour_map() -> Colormap:
    """Return colours for what may grow or shrink: blue, white, orange; of equal lightness on both sides."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415  # optional

    colours = ["#084b83", "#3f8fc4", "#a9cfe8", "#f4f4f2", "#f6c79b", "#dd7f2f", "#8f3f00"]
    return LinearSegmentedColormap.from_list("change", colours)


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
    parts = tail.split(".", 1)
    return f"…{parts[1] if len(parts) > 1 and len(parts[1]) * 2 > length else tail}"


def row_height(count: int) -> float:
    """Return the height in inches of each row of a figure with many rows.

    Example:
        >>> row_height(20), row_height(100), row_height(1000)
        (0.17, 0.125, 0.02)
    """
    return 0.17 if count <= 60 else min(0.125, 20 / count)


def label_rows(ax: Axes, names: Sequence[str], height: float, length: int = 30) -> None:
    """Name the rows of a figure, from the top; every second, third, ... if they are too low for all names.

    Args:
        ax: Where.
        names: The names.
        height: Height of a row in inches.
        length: The longest name that there is room for.
    """
    every = max(1, math.ceil(0.12 / height))
    ax.set_yticks(range(0, len(names), every), [shorten(name, length) for name in names[::every]], fontsize=7.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", lw=0.4)
