"""Words for terminals, log files and notebooks: lists that are cut off, the name that was probably meant, tables.

Imports nothing of the package.
"""

from __future__ import annotations

import difflib
import html
import io
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console, RenderableType

_Item = TypeVar("_Item")

_MOST_SHOWN = 8
_WIDTH_OF_LOGS = 120
_LEAST_WIDTH = 60

# A line below the titles, in ASCII: any log file can hold it.
TEXT_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def abbreviated(names: Iterable[object]) -> str:
    """List names in a message, quoted and not too many of them.

    Args:
        names: The names.

    Example:
        >>> abbreviated(["conv1", "fc"])
        "'conv1', 'fc'"
    """
    return cut_off(names, repr)


def cut_off(items: Iterable[_Item], text: Callable[[_Item], str] = str) -> str:
    """List texts in a message, as they are and not too many of them.

    Args:
        items: The texts, or what they are made of.
        text: Makes the text of an item that is shown.

    Example:
        >>> cut_off(str(number) for number in range(10))
        '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'
    """
    listed = list(items)
    shown = ", ".join(map(text, listed[:_MOST_SHOWN]))
    return shown if len(listed) <= _MOST_SHOWN else f"{shown} and {len(listed) - _MOST_SHOWN} more"


def closest(name: object, allowed: Iterable[str], most: int = 3) -> str:
    """Suggest the names that are most like ``name``, as a sentence to append to a message, or nothing.

    Args:
        name: The name that does not exist.
        allowed: The names that do.
        most: How many to suggest.

    Example:
        >>> closest("con1", ["conv1", "fc"])
        " Did you mean 'conv1'?"
    """
    matches = difflib.get_close_matches(str(name), list(allowed), n=most)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def printable(text: str) -> str:
    r"""Write out what a terminal would obey in place of showing it: escape sequences, control characters, overrides.

    Args:
        text: A text out of a file, such as the name of a layer.

    Example:
        >>> printable("a\x1b]0;title\x07")
        'a\\x1b]0;title\\x07'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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


def as_html(head: str, titles: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a table as HTML for a notebook; whatever is in the texts is shown and never interpreted.

    Args:
        head: A line above the table.
        titles: The titles of its columns.
        rows: The cells of its rows.
        notes: Lines below it.

    Example:
        >>> as_html("All.", ["Layer"], [["a<b"]])
        '<p>All.</p><table><thead><tr><th>Layer</th></tr></thead><tbody><tr><td>a&lt;b</td></tr></tbody></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    table = f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"
    return f"<p>{html.escape(head)}</p>{table}{below}"
