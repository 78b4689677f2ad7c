"""Writing results: files that are not overwritten by accident, tables for people and for pipes, short warnings."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from amct_lightning.commands.base import UserError
from amct_lightning.files import check_writable, is_file, write_text
from amct_lightning.wording import printable

_UNLIMITED = 10_000


def check_output(path: str | Path, force: bool, what: str) -> None:
    """Make sure, before any work, that a file may be written.

    Args:
        path: The file.
        force: Whether it may be replaced.
        what: What it is, for the message.

    Raises:
        UserError: If it exists and may not be replaced.
        OSError: If it cannot be written.
    """
    if is_file(path) and not force:
        raise UserError(f"'{path}' exists. Give another path, or --force to replace it.")
    check_writable(path, what)


def deliver(text: str, path: str | None, force: bool, what: str) -> None:
    """Write a result to a file, atomically, or to stdout.

    Args:
        text: The result.
        path: The file, ``None`` for stdout.
        force: Whether the file may be replaced.
        what: What it is, for messages.
    """
    if path is None:
        sys.stdout.write(text if text.endswith("\n") or not text else f"{text}\n")
        return
    check_output(path, force, what)
    write_text(path, text)
    sys.stdout.write(f"Wrote the {what} to '{path}'.\n")


def new_table(*columns: str) -> Table:
    """Return an empty table, with a frame on a terminal and plain columns in a pipe or file.

    Args:
        columns: The titles; those that begin with ``>`` are of numbers, at the right.
    """
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for title in columns:
        is_number = title.startswith(">")
        table.add_column(title.removeprefix(">"), justify="right" if is_number else "left", overflow="fold")
    return table


def show(table: RenderableType) -> None:
    """Print a table, or whatever rich can; what goes into a pipe or file is never cut to the width of a terminal."""
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else _UNLIMITED, highlight=False).print(table)


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Let warnings be one line each, without the place in the source that issues them."""

    def write(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
        sys.stderr.write("\n".join(map(printable, f"warning: {message}".splitlines())) + "\n")

    with warnings.catch_warnings():
        warnings.showwarning = write
        yield
