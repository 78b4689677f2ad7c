"""Writing and reading long lists of numbers in a record text, all of them at a time, as protobuf does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

# Powers of ten that float64 holds exactly: the product with one is rounded once.
_POWERS: Final = np.array([float(f"1e{k}") for k in range(23)])
_SMALLEST: Final = -14  # decimal exponent with which these powers are all that it takes
_NEAR_TIE: Final = 1e-6  # more than the rounding of a product below 1e9, by which it may be on the wrong side of a tie


def _four_digits() -> _Array:
    """Return the texts of 0 to 9999 with four digits each, and once more without the zeros at their ends."""
    texts = [f"{number:04}" for number in range(10_000)]
    texts += [text.rstrip("0").ljust(4, "\0") for text in texts]
    return np.frombuffer("".join(texts).encode(), np.uint32)


_DIGITS: Final = _four_digits()
# What stands before and behind the digits with the exponents -1, -2, ...
_HEADS: Final = np.array([b"0." + b"0" * k if k < 4 else b"" for k in range(-_SMALLEST)], "S8").view(np.uint64)
_TAILS: Final = np.array([b"" if k < 4 else f"e-{k + 1:02}".encode() for k in range(-_SMALLEST)], "S4").view(np.uint32)

_PLACES: Final = 14  # digits behind the point with which what is before an exponent is a whole number of float64
_COUNTED_BACK: Final = np.arange(_PLACES, 0, -1, dtype=np.uint8)
_OF_PLACES: Final = _POWERS[_PLACES - 1 :: -1].copy()
_PLAIN: Final = re.compile(rb"(0|[1-9][0-9]*)(\.[0-9]+)?(e-[0-9]+)?")


def float_lines(start: str, values: _Array, by_protobuf: Callable[[list[float]], str]) -> str:
    r"""Write float32 numbers, each on a line of its own, as protobuf does: as short as they can be read back.

    Args:
        start: What stands before each number.
        values: Numbers greater than 0, 1-d float32.
        by_protobuf: Gives the lines of some numbers; called for those from 1 on, below 1e-14, or near a tie.

    Example:
        >>> float_lines("x: ", np.array([0.1, 2.5e-7], np.float32), str)
        'x: 0.1\nx: 2.5e-07\n'
    """
    digits, place, certain = _shortest(values)
    rest = digits // 10_000
    first = rest // 10_000
    middle, last = rest - first * 10_000, digits - rest * 10_000
    # A table of bytes, of which those that are 0 are taken out in the end.
    fields = [("start", f"S{len(start)}"), ("head", "u8"), ("first", "u1"), ("point", "u1"), ("middle", "u4")]
    rows = np.zeros(len(values), np.dtype([*fields, ("last", "u4"), ("tail", "u4"), ("end", "u1")]))
    rows["start"] = start
    rows["head"], rows["tail"] = _HEADS[place], _TAILS[place]
    rows["first"] = first + ord("0")
    rows["point"] = np.where((place >= 4) & ((middle != 0) | (last != 0)), ord("."), 0)
    rows["middle"], rows["last"] = _DIGITS[middle + 10_000 * (last == 0)], _DIGITS[last + 10_000]
    rows["end"] = ord("\n")
    if certain.all():
        return _joined(rows)
    others = by_protobuf(values[~certain].tolist()).splitlines(keepends=True)
    parts, before = [], 0
    for position, line in zip(np.flatnonzero(~certain).tolist(), others, strict=True):
        parts += [_joined(rows[before:position]), line]
        before = position + 1
    return "".join([*parts, _joined(rows[before:])])


def _joined(rows: _Array) -> str:
    return rows.tobytes().translate(None, b"\0").decode()


def read_floats(lines: bytes, start: bytes) -> _Array | None:
    r"""Read numbers, each on a line of its own, as Python's ``float`` does, and round them to float32.

    What is here a whole number below 2 ** 53, divided by a power of ten that float64 holds exactly, is rounded once.

    Args:
        lines: Lines that each hold ``start`` and a number, without the last line's end.
        start: What stands before each number, from the end of the line before; at least 14 bytes.

    Returns:
        The numbers, float32; ``None`` if a line is something else, or a number that is written in another way than
        protobuf writes positive ones.

    Example:
        >>> read_floats(b"\n    scale_w: 0.25\n    scale_w: 5e-07", b"\n    scale_w: ").tolist()
        [0.25, 4.999999987376214e-07]
    """
    text = np.frombuffer(lines, np.uint8)
    begins = np.flatnonzero(text == ord("\n"))
    if lines.count(start) != len(begins):
        return None
    first, end = begins + len(start), np.append(begins[1:], len(text))
    tens, ones = text[end - 2] - ord("0"), text[end - 1] - ord("0")
    has_exponent = (text[end - 4] == ord("e")) & (text[end - 3] == ord("-")) & (tens < 10) & (ones < 10)
    exponents = np.where(has_exponent, tens * 10 + ones, 0)
    stop = end - 4 * has_exponent
    places = stop - first - 2  # behind the point
    second = text[np.minimum(first + 1, len(text) - 1)]
    usual = (second == ord(".")) & (places > 0) & (places <= _PLACES) & (places + exponents < len(_POWERS))
    before_point = text[np.minimum(first, len(text) - 1)] - ord("0")
    behind = np.lib.stride_tricks.sliding_window_view(text, _PLACES)[stop - _PLACES] - ord("0")
    behind *= np.where(usual, places, 0).astype(np.uint8)[:, None] >= _COUNTED_BACK
    usual &= before_point < 10
    if (behind >= 10).any():
        usual &= (behind < 10).all(axis=1)
    places = np.where(usual, places, 1)
    whole = before_point * _POWERS[places] + behind @ _OF_PLACES
    numbers = whole / _POWERS[places + np.where(usual, exponents, 0)]
    for row in np.flatnonzero(~usual).tolist():
        number = lines[first[row] : end[row]]
        if not _PLAIN.fullmatch(number):
            return None
        numbers[row] = float(number)
    with np.errstate(over="ignore"):
        found: _Array = numbers.astype(np.float32)
    return found


def _shortest(values: _Array) -> tuple[_Array, _Array, _Array]:
    """Return for each value nine digits, the place of the first one behind the point, and whether that is certain.

    The digits are those of the value with as few of 6, 7, 8 or 9 digits as it takes to get it back, and then zeros.
    """
    wide = values.astype(np.float64)
    exponents = np.floor(np.log10(wide)).astype(np.int64)
    certain = (exponents >= _SMALLEST) & (exponents < 0)
    place = np.where(certain, -1 - exponents, 0)
    digits = np.zeros(len(values))
    with np.errstate(over="ignore"):  # of numbers that are not certain
        for count in (9, 8, 7, 6):
            power = _POWERS[place + count]
            exact = wide * power
            rounded = np.rint(exact)
            if count > 6:  # with a tie at 6 digits, these are too far from the value to get it back
                certain &= np.abs(np.abs(exact - rounded) - 0.5) > _NEAR_TIE
            fits = (rounded / power).astype(np.float32) == values
            np.copyto(digits, rounded * 10 ** (9 - count), where=fits)
    certain &= (digits >= 1e8) & (digits < 1e9)  # else the exponent is another one, by an error of log10 or by rounding
    return np.where(certain, digits, 1e8).astype(np.uint32), place, certain
