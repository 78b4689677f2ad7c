"""Tables as plain text for terminals and log files."""

from __future__ import annotations

import io
import shutil

from rich import box
from rich.console import Console, RenderableType

_WIDTH_OF_LOGS = 120
_LEAST_WIDTH = 60

# A line below the titles, in ASCII: any log file can hold it.
TEXT_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def as_text(renderable: RenderableType) -> str:
    """Return what rich would show, as plain text that fits the terminal, or a log file where there is none.

    Args:
        renderable: Anything that rich can print.

    Example:
        >>> as_text("[bold]text[/bold]")
        'text'
    """
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_WIDTH_OF_LOGS, 24)).columns)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
