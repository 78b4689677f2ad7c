"""Completion in the shell: jsonargparse's, by argcomplete, which sets environment variables and calls the command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def is_completing() -> bool:
    """Tell whether a shell asks for completions."""
    return "_ARGCOMPLETE" in os.environ


def finished_words() -> list[str]:
    """Return the words on the shell's command line after the program, without the one that is being typed."""
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    words = line.split() if line.endswith(" ") else line.split()[:-1]
    return words[int(os.environ["_ARGCOMPLETE"]) :]


def offer(parser: ArgumentParser, used: Sequence[str] = ()) -> None:
    """Answer the shell with what a parser takes; the process ends.

    argcomplete (seen in 3.7) fails in the subcommands of jsonargparse (seen in 4.53), so the parser is that of the
    subcommand alone, and argcomplete begins its work behind the words that lead there.

    Args:
        parser: The parser.
        used: The words that lead to it.
    """
    skip(len(used))
    parser.parse_args([])


def skip(words: int) -> None:
    """Let argcomplete begin some words later."""
    os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + words)
