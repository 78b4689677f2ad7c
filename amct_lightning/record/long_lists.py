"""Reading long lists of numbers in a record text, a layer's list at a time instead of a number at a time.

protobuf writes and reads its text in Python, at some microseconds for each number, of which a large network has
millions. What is read here protobuf reads as well; all that is not plain is left to it. ``float_lines.py`` writes.
"""

from __future__ import annotations

from typing import Final

LONG: Final = 32
"""Number of values from which a list is worth it."""

SCALES: Final = ("scale_w", "scale_r")
OFFSETS: Final = ("offset_w", "offset_r")


def cut_lists(text: bytes) -> tuple[bytes, dict[str, list[float] | list[int]]]:
    r"""Cut long lists of numbers, each on a line of its own, out of the text of one layer, but for their first numbers.

    Args:
        text: Lines of one layer.

    Returns:
        The rest, and field -> all of its numbers, rounded to float64 only.

    Example:
        >>> rest, numbers = cut_lists(b"{" + 40 * b"\n    offset_w: 0" + b"\n}")
        >>> rest, len(numbers["offset_w"])
        (b'{\n    offset_w: 0\n}', 40)
    """
    numbers: dict[str, list[float] | list[int]] = {}
    for field in (*SCALES, *OFFSETS):
        start = f"\n    {field}: ".encode()
        begin = text.find(start)
        end = text.find(b"\n", text.rfind(start) + 1)
        if begin < 0 or end < 0:
            continue
        found = _floats(text[begin:end], start) if field in SCALES else _zeros(text[begin:end], start)
        if found is not None and len(found) >= LONG:
            numbers[field] = found
            text = text[: text.find(b"\n", begin + 1)] + text[end:]
    return text, numbers


_OF_NUMBERS: Final = b"0123456789.e-"


def _floats(lines: bytes, start: bytes) -> list[float] | None:
    """Return the numbers of lines that each hold ``start`` and a plain number, ``None`` if one does not."""
    rows = lines.split(start)[1:]
    is_plain = lines.translate(None, _OF_NUMBERS) == start.translate(None, _OF_NUMBERS) * len(rows)
    # Python reads numbers that begin with 00 to 09 as well, which protobuf does not.
    if not is_plain or lines.count(b" 0") != lines.count(b" 0.") or b" -" in lines:
        return None
    try:
        return list(map(float, rows))
    except ValueError:
        return None


def _zeros(lines: bytes, start: bytes) -> list[int] | None:
    count = lines.count(start)
    return [0] * count if lines == (start + b"0") * count else None
