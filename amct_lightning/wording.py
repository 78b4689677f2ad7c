"""Words of messages: lists that are cut off, and the name that was probably meant. Imports nothing of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_SHOWN = 8


def abbreviated(names: Iterable[object]) -> str:
    """List names in a message, quoted and not too many of them.

    Args:
        names: The names.

    Example:
        >>> abbreviated(["conv1", "fc"])
        "'conv1', 'fc'"
    """
    return cut_off(map(repr, names))


def cut_off(texts: Iterable[str]) -> str:
    """List texts in a message, as they are and not too many of them.

    Args:
        texts: The texts.

    Example:
        >>> cut_off(str(number) for number in range(10))
        '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'
    """
    listed = list(texts)
    shown = ", ".join(listed[:_MOST_SHOWN])
    return shown if len(listed) <= _MOST_SHOWN else f"{shown} and {len(listed) - _MOST_SHOWN} more"


def closest(name: object, allowed: Iterable[str]) -> str:
    """Suggest the names that are most like ``name``, as a sentence to append to a message, or nothing.

    Args:
        name: The name that does not exist.
        allowed: The names that do.

    Example:
        >>> closest("con1", ["conv1", "fc"])
        " Did you mean 'conv1'?"
    """
    matches = difflib.get_close_matches(str(name), list(allowed), n=3)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
