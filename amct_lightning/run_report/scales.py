"""The distribution of a layer's weight scales in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from amct_lightning.record import LayerRecord


@dataclass(frozen=True)
class ScaleSummary:
    """The weight scales of one layer.

    Attributes:
        count: How many there are: 1, or one per output channel.
        low: The smallest of those above 0; NaN if there is none.
        quarter: A quarter of them is below.
        middle: The median.
        three_quarters: A quarter of them is above.
        high: The largest.
        unusable: How many are not finite or not above 0; these do not count for the others.
    """

    count: int
    low: float
    quarter: float
    middle: float
    three_quarters: float
    high: float
    unusable: int = 0

    @property
    def spread(self) -> float:
        """How many times larger the largest is than the smallest."""
        return self.high / self.low


def summarize(scales: Sequence[float]) -> ScaleSummary:
    """Summarize weight scales.

    Args:
        scales: The scales.

    Returns:
        The summary.

    Example:
        >>> summarize([0.1, 0.2, 0.3, 0.4, 0.5, -1.0])
        ScaleSummary(count=6, low=0.1, quarter=0.2, middle=0.3, three_quarters=0.4, high=0.5, unusable=1)
    """
    usable = sorted(scale for scale in scales if math.isfinite(scale) and scale > 0)
    unusable = len(scales) - len(usable)
    if not usable:
        return ScaleSummary(len(scales), *(math.nan,) * 5, unusable)
    quarter, _, three_quarters = quantiles(usable, method="inclusive") if len(usable) > 1 else usable * 3
    return ScaleSummary(len(scales), usable[0], quarter, median(usable), three_quarters, usable[-1], unusable)


def scales_of_record(record: Mapping[str, LayerRecord]) -> dict[str, ScaleSummary]:
    """Summarize the weight scales in a record, by layer, of recurrent ones also ``<layer> (recurrent)``.

    Args:
        record: The record.

    Returns:
        The summaries; a BatchNorm that is folded is contained in them.
    """
    found = {}
    for name, layer in record.items():
        if layer.scale_w:
            found[name] = summarize(layer.scale_w)
        if layer.scale_r:
            found[f"{name} (recurrent)"] = summarize(layer.scale_r)
    return found
