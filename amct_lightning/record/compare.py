"""Where two records differ: the one comparison, for equality within a tolerance, for messages and for tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A field that two records do not share; its text is one line for a message.

    Attributes:
        layer: Name of the layer; empty for the entries of other features (pruning, key/value caches).
        field: Name of the field; empty if only one side has the layer.
        here: What the first record has, ``None`` for nothing.
        there: What the second record has.
        places: Where two lists of the same length differ.
    """

    layer: str
    field: str
    here: Any
    there: Any
    places: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.layer and not self.field:
            return "the entries of other features (pruning, key/value caches) differ"
        return ": ".join(filter(None, (self.layer, self.field, self._what())))

    def _what(self) -> str:
        here, there = self.here, self.there
        if not self.field:
            return f"only {'there' if here is None else 'here'}"
        if self.places:
            first = self.places[0]
            place = f"{len(self.places)} of {len(here)} values, first [{first}]: "
            return f"{place}{here[first]!r} here, {there[first]!r} there"
        if isinstance(here, list) and isinstance(there, list):
            return f"{len(here)} values here, {len(there)} there"
        return f"{here!r} here, {there!r} there"


def compare(
    here: Mapping[str, Any], there: Mapping[str, Any], rtol: float = 0.0, atol: float = 0.0
) -> Iterator[Difference]:
    """Yield where the layers of two records differ.

    Args:
        here: Layer name -> :class:`LayerRecord` of one record.
        there: Those of the other.
        rtol: Tolerance of floats, relative to the larger one. Integers and words must be equal.
        atol: Absolute tolerance of floats; they are equal within either.

    Yields:
        One difference per layer that only one side has and per field that is not equal.

    Example:
        >>> from amct_lightning.record import LayerRecord
        >>> one, other = ({"fc": LayerRecord(scale, 3, [0.25], [0])} for scale in (0.5, 0.625))
        >>> [(found.layer, found.field, found.here, found.there) for found in compare(one, other)]
        [('fc', 'scale_d', 0.5, 0.625)]
        >>> list(compare(one, other, rtol=0.25))
        []
    """
    for name in dict.fromkeys([*here, *there]):
        if name not in here or name not in there:
            yield Difference(name, "", here.get(name), there.get(name))
            continue
        for field, one, other in _fields(here[name], there[name]):
            if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
                pairs = enumerate(zip(one, other, strict=True))
                places = tuple(place for place, pair in pairs if not _close(*pair, rtol, atol))
                if places:
                    yield Difference(name, field, one, other, places)
            elif not _close(one, other, rtol, atol):
                yield Difference(name, field, one, other)


def _fields(here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields of two layers with both values, those of key/value caches if both have one."""
    for item in fields(here):
        one, other = getattr(here, item.name), getattr(there, item.name)
        if is_dataclass(one) and is_dataclass(other):
            yield from ((f"{item.name} {inner}", *values) for inner, *values in _fields(one, other))
        else:
            yield item.name, one, other


def _close(here: object, there: object, rtol: float, atol: float) -> bool:
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=rtol, abs_tol=atol)
    return here == there
