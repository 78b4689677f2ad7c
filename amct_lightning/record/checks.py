"""What the hardware tools accept in each field of a layer: every check yields its problems as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Final

OFFSET_RANGES: Final = MappingProxyType({"INT4": (-8, 7), "INT8": (-128, 127), "INT16": (-32768, 32767)})
PER_TOKEN: Final = "_PER_TOKEN"
"""What the type of activations ends with whose scale is computed for each token when the network runs."""
RANGELESS: Final = (*(f"{width}{PER_TOKEN}" for width in OFFSET_RANGES), "FLOAT")
"""Types of activations without a scale and an offset in the record, beside those of :data:`OFFSET_RANGES`."""
PRECISION_MODES: Final = ("DEFAULT", "FORCE_FP16_QUANT")
MAX_SHIFT: Final = 16
INT32_RANGE: Final = (-(2**31), 2**31 - 1)


def check_word(name: str, value: object, allowed: Sequence[str]) -> Iterator[str]:
    """Yield a problem unless ``value`` is one of the allowed words.

    Example:
        >>> next(check_word("act_type", "INT3", ("INT4", "INT8")))
        "act_type is 'INT3'; it must be one of INT4, INT8."
    """
    if value not in allowed:
        yield f"{name} is {value!r}; it must be one of {', '.join(allowed)}."


def check_scales(name: str, scales: Sequence[float]) -> Iterator[str]:
    """Yield a problem for every scale that is not a finite, positive float32.

    Example:
        >>> next(check_scales("scale_w", [1.0, 0.0]))
        'scale_w[1] is 0.0; a scale must be finite and greater than 0 in float32.'
    """
    if scales and math.isfinite(sum(scales)) and min(scales) > 0:
        return  # thousands of scales are looked at together, and one by one only if there is a problem
    for position, scale in enumerate(scales):
        yield from check_scale(f"{name}[{position}]", scale)


def check_scale(name: str, scale: float) -> Iterator[str]:
    """Yield a problem unless the scale is a finite, positive float32.

    Example:
        >>> list(check_scale("scale_d", 0.5))
        []
    """
    if not (math.isfinite(scale) and scale > 0):
        yield f"{name} is {scale}; a scale must be finite and greater than 0 in float32."


def check_offset(name: str, offset: int, act_type: str) -> Iterator[str]:
    """Yield a problem unless the offset of an activation fits its type.

    Example:
        >>> next(check_offset("offset_d", 300, "INT8"))
        'offset_d is 300; with act_type INT8 it must be in -128..127.'
    """
    low, high = OFFSET_RANGES[act_type]
    if not low <= offset <= high:
        yield f"{name} is {offset}; with act_type {act_type} it must be in {low}..{high}."


def check_input(scale: float | None, offset: int | None, act_type: str) -> Iterator[str]:
    """Yield the problems of the factors of an input: both are there, or none where the type says so.

    Example:
        >>> next(check_input(0.5, 0, "FLOAT"))
        'scale_d is 0.5 and offset_d 0; with act_type FLOAT there must be neither.'
    """
    if act_type in RANGELESS:
        if scale is not None or offset is not None:
            yield f"scale_d is {scale} and offset_d {offset}; with act_type {act_type} there must be neither."
        return
    for name, value in (("scale_d", scale), ("offset_d", offset)):
        if value is None:
            yield f"{name} is missing; only with act_type {' or '.join(RANGELESS)} there is none."
    if scale is not None:
        yield from check_scale("scale_d", scale)
    if offset is not None:
        yield from check_offset("offset_d", offset, act_type)


def check_weight(suffix: str, scales: Sequence[float], offsets: Sequence[int]) -> Iterator[str]:
    """Yield the problems of a weight's factors, ``scale_<suffix>`` and ``offset_<suffix>``.

    Example:
        >>> next(check_weight("w", [1.0, 1.0], [0]))
        'scale_w has 2 values and offset_w has 1; both need one per output channel, or one for all.'
    """
    if len(scales) != len(offsets) or not scales:
        yield (
            f"scale_{suffix} has {len(scales)} values and offset_{suffix} has {len(offsets)}; "
            f"both need one per output channel, or one for all."
        )
    yield from check_scales(f"scale_{suffix}", scales)
    if not any(offsets):
        return
    for position, offset in enumerate(offsets):
        if offset != 0:
            yield f"offset_{suffix}[{position}] is {offset}; weights have no offset, it must be 0."


def check_shift(shifts: Sequence[int], channels: int) -> Iterator[str]:
    """Yield the problems of the shifts of search-N; no shifts at all are fine.

    Example:
        >>> next(check_shift([0, 3], channels=2))
        'shift_bit is [0, 3]; all values must be 0, or each in 1..16.'
    """
    if len(shifts) not in {0, 1, channels}:
        yield f"shift_bit has {len(shifts)} values; it must have 1 or as many as scale_w, {channels}."
    elif any(shifts) and not all(1 <= shift <= MAX_SHIFT for shift in shifts):
        yield f"shift_bit is {list(shifts)}; all values must be 0, or each in 1..{MAX_SHIFT}."


def check_recurrent(
    scale_h: float | None,
    offset_h: int | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    act_type: str,
) -> Iterator[str]:
    """Yield the problems of the factors that only LSTM and GRU have; none of them given is fine.

    Example:
        >>> next(check_recurrent(0.5, None, [], [], "INT8"))
        'scale_h, offset_h, scale_r and offset_r belong together; offset_h, scale_r and offset_r are missing.'
    """
    given = {
        "scale_h": scale_h is not None,
        "offset_h": offset_h is not None,
        "scale_r": len(scales) > 0,
        "offset_r": len(offsets) > 0,
    }
    missing = [name for name, is_given in given.items() if not is_given]
    if len(missing) == len(given):
        return
    if act_type in RANGELESS:
        yield f"act_type is {act_type}, which no LSTM or GRU has, and scale_h, offset_h, scale_r or offset_r is given."
        return
    if scale_h is None or offset_h is None or missing:
        yield f"scale_h, offset_h, scale_r and offset_r belong together; {_listed(missing)} missing."
        return
    yield from check_scale("scale_h", scale_h)
    yield from check_offset("offset_h", offset_h, act_type)
    yield from check_weight("r", scales, offsets)


def check_kv_cache(scales: Sequence[float], offsets: Sequence[int]) -> Iterator[str]:
    """Yield the problems of a key/value cache's factors.

    Example:
        >>> next(check_kv_cache([0.5], []))
        'kv_cache has 1 scales and 0 offsets; it needs as many of both.'
    """
    if len(scales) != len(offsets):
        yield f"kv_cache has {len(scales)} scales and {len(offsets)} offsets; it needs as many of both."
    yield from check_scales("kv_cache scale", scales)
    low, high = INT32_RANGE
    for position, offset in enumerate(offsets):
        if not low <= offset <= high:
            yield f"kv_cache offset[{position}] is {offset}; it must be in {low}..{high}."


def check_text(name: str, value: object) -> Iterator[str]:
    """Yield a problem unless ``value`` is text that a file can hold.

    Example:
        >>> next(check_text("dst_type", 8))
        'dst_type is 8; it must be text.'
    """
    if not isinstance(value, str):
        yield f"{name} is {value!r}; it must be text."
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        yield f"{name} is {value!r}; it must be text that UTF-8 can write (it holds a lone surrogate)."


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{', '.join(names[:-1])} and {names[-1]} are"
