"""Numbers in the precision of the record file: float32 and whole numbers, and how two of them compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from ctypes import c_float
from operator import index
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


# Any: these stand at the boundary, where callers hand in tensors, NumPy scalars or mistakes.
def to_float32(name: str, value: Any) -> float:
    """Round a number to the float32 that the file will hold.

    Args:
        name: The field, for the message.
        value: Anything that ``float`` takes, except text.

    Returns:
        The nearest float32, ``inf`` when it is too large for float32.

    Raises:
        TypeError: If ``value`` is not a number.

    Example:
        >>> to_float32("scale_d", 0.1)
        0.10000000149011612
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        return c_float(float(value)).value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {value!r}; it must be a number.") from error
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def to_integer(name: str, value: Any) -> int:
    """Take a whole number without rounding.

    Args:
        name: The field, for the message.
        value: Anything that is exactly an integer by type.

    Returns:
        The number as ``int``.

    Raises:
        TypeError: If ``value`` is not a whole number by type.

    Example:
        >>> to_integer("offset_d", 3)
        3
    """
    try:
        return index(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r}; it must be an integer (int).") from error


def to_list(name: str, values: Iterable[Any], convert: Callable[[str, Any], Number]) -> list[Number]:
    """Convert every number of a sequence.

    Args:
        name: The field, for the message.
        values: The numbers.
        convert: :func:`to_float32` or :func:`to_integer`.

    Returns:
        A new list.

    Raises:
        TypeError: If ``values`` is not a sequence of numbers.

    Example:
        >>> to_list("offset_w", (0, 0), to_integer)
        [0, 0]
    """
    try:
        items = list(values)
    except TypeError as error:
        raise TypeError(f"{name} is {values!r}; it must be a list of numbers.") from error
    return [convert(f"{name}[{position}]", item) for position, item in enumerate(items)]


def difference(here: object, there: object, rtol: float) -> str | None:
    """Say how two values of a field differ, floats within a relative tolerance.

    Args:
        here: A number, a word, a list of numbers or None.
        there: The value to compare with.
        rtol: Tolerance of floats relative to the larger one.

    Returns:
        What differs, or None.

    Example:
        >>> difference([0.5, 1.0], [0.5, 2.0], 1e-4)
        '1 of 2 values, first [1]: 1.0 here, 2.0 there'
        >>> difference(1.0, 1.00001, 1e-4) is None
        True
    """
    if isinstance(here, list) and isinstance(there, list):
        return _list_difference(here, there, rtol)
    return None if _close(here, there, rtol) else f"{here!r} here, {there!r} there"


def _list_difference(here: list[Any], there: list[Any], rtol: float) -> str | None:
    if len(here) != len(there):
        return f"{len(here)} values here, {len(there)} there"
    differing = [n for n, pair in enumerate(zip(here, there, strict=True)) if not _close(*pair, rtol)]
    if not differing:
        return None
    first = differing[0]
    example = f"first [{first}]: {here[first]!r} here, {there[first]!r} there"
    return f"{len(differing)} of {len(here)} values, {example}"


def _close(here: object, there: object, rtol: float) -> bool:
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=rtol)
    return here == there
