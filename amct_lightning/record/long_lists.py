"""Reading long lists of numbers in a record text, a layer's list at a time instead of a number at a time.

protobuf writes and reads its text in Python, at some microseconds for each number, of which a large network has
millions. What is read here protobuf reads as well; all that is not plain is left to it. ``float_lines.py`` writes.
"""

from __future__ import annotations

from typing import Any, Final

LONG: Final = 32
"""Number of values from which a list is worth it."""

LISTS: Final = ("scale_w", "offset_w", "scale_r", "offset_r")
"""The fields with a value for each channel, in the order of the text."""

OFFSETS: Final = ("offset_w", "offset_r")


def cut_lists(text: bytes) -> tuple[bytes, dict[str, Any]]:
    r"""Cut long lists of numbers, each on a line of its own, out of the text of one layer, but for their first numbers.

    Args:
        text: Lines of one layer.

    Returns:
        The rest, and field -> all of its numbers: floats as an array of float32, integers as a list.

    Example:
        >>> rest, numbers = cut_lists(b"{" + 40 * b"\n    offset_w: 0" + b"\n}")
        >>> rest, len(numbers["offset_w"])
        (b'{\n    offset_w: 0\n}', 40)
    """
    numbers: dict[str, Any] = {}
    for field in LISTS:
        start = f"\n    {field}: ".encode()
        begin = text.find(start)
        end = text.find(b"\n", text.rfind(start) + 1)
        if begin < 0 or end < 0:
            continue
        found = _zeros(text[begin:end], start) if field in OFFSETS else _floats(text[begin:end], start)
        if found is not None and len(found) >= LONG:
            numbers[field] = found
            text = text[: text.find(b"\n", begin + 1)] + text[end:]
    return text, numbers


def _floats(lines: bytes, start: bytes) -> Any:  # an array of NumPy, which is loaded only if there is one
    if len(lines) < LONG * len(start):
        return None
    from amct_lightning.record.float_lines import read_floats  # noqa: PLC0415

    return read_floats(lines, start)


def _zeros(lines: bytes, start: bytes) -> list[int] | None:
    count = len(lines) // (len(start) + 1)
    return [0] * count if lines == (start + b"0") * count else None
