"""Numbers in the precision of the record file: float32 and whole numbers."""

from __future__ import annotations

import math
from array import array
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
    kind = str(getattr(values, "dtype", "")), getattr(values, "ndim", 0)
    if convert is to_float32 and kind == ("float32", 1):  # an array of NumPy, which is not loaded for this
        numbers: list[Number] = values.tolist()  # type: ignore[attr-defined]
        return numbers
    try:
        items = list(values)
    except TypeError as error:
        raise TypeError(f"{name} is {values!r}; it must be a list of numbers.") from error
    types = set(map(type, items))
    if convert is to_float32 and types == {float}:  # thousands of them, for each of which a call would take its time
        rounded: list[Number] = array("f", items).tolist()
        return rounded
    if convert is to_integer and types == {int}:
        return items
    return [convert(f"{name}[{position}]", item) for position, item in enumerate(items)]
