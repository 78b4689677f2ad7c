"""What a monitor knows of a layer after an interval, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from amct_lightning.callbacks.monitor.layers import FACTORS
from amct_lightning.callbacks.monitor.metric import SUMS

_COLUMNS = (*SUMS, "lowest", "highest", *FACTORS)


@dataclass(frozen=True)
class LayerReading:
    """The state of one quantized layer; ``None`` is not known.

    Attributes:
        layer: Name of the layer; the hidden state of a recurrent layer has a reading of its own.
        clip_max: Upper clip of the activations.
        clip_min: Lower clip of the activations.
        scale: Scale of the activations.
        offset: Offset (zero point) of the activations.
        saturation_low: Fraction of the activations strictly below the range.
        saturation_high: Fraction of the activations strictly above the range.
        utilisation: Number of integer levels from the smallest to the largest that occurred, both included, of the
            ``2^bits`` that there are.
        sqnr_input_db: Signal to quantization noise ratio of the activations, ``10 log10(sum x^2 / sum (x-q)^2)``.
        sqnr_weight_db: The same of the weight.
        weight_scale_mean: Mean of the weight scales.
        clip_drift: How far the two clips have moved together since the calibration, relative to the width of the
            range then.
        weight_scale_drift: How far the weight scales have moved on average, relative to their mean then.
    """

    layer: str
    clip_max: float | None = None
    clip_min: float | None = None
    scale: float | None = None
    offset: float | None = None
    saturation_low: float | None = None
    saturation_high: float | None = None
    utilisation: float | None = None
    sqnr_input_db: float | None = None
    sqnr_weight_db: float | None = None
    weight_scale_mean: float | None = None
    clip_drift: float | None = None
    weight_scale_drift: float | None = None

    @property
    def saturation(self) -> float | None:
        """Fraction of the activations beyond the range, on either side."""
        if self.saturation_low is None or self.saturation_high is None:
            return None
        return self.saturation_low + self.saturation_high

    @classmethod
    def of(cls, layer: str, num_bits: int, values: Sequence[float]) -> LayerReading:
        """Make a reading of the sums and factors of a layer.

        Args:
            layer: Its name.
            num_bits: Number of bits of the activations.
            values: ``SUMS``, lowest and highest code, ``FACTORS``.

        Example:
            >>> values = [4.0, 0.0, 1.0, 100.0, 1.0, -8.0, -1.0, *[float("nan")] * 9]
            >>> reading = LayerReading.of("conv", 4, values)
            >>> reading.saturation, reading.utilisation, reading.sqnr_input_db, reading.clip_max
            (0.25, 0.5, 20.0, None)
        """
        raw = dict(zip(_COLUMNS, values, strict=True))
        elements = raw["elements"]
        known = {field.name: _known(raw[field.name]) for field in fields(cls) if field.name in raw}
        return cls(
            layer=layer,
            saturation_low=raw["below"] / elements if elements else None,
            saturation_high=raw["above"] / elements if elements else None,
            utilisation=_known((raw["highest"] - raw["lowest"] + 1) / 2**num_bits),
            sqnr_input_db=sqnr_db(raw["signal"], raw["noise"]),
            sqnr_weight_db=sqnr_db(raw["weight_signal"], raw["weight_noise"]),
            **known,
        )


def sqnr_db(signal: float, noise: float) -> float | None:
    """Return the signal to quantization noise ratio in decibels.

    Args:
        signal: Sum of the squares of the values.
        noise: Sum of the squares of their quantization errors.

    Returns:
        The ratio; infinity without noise; ``None`` without a signal, or if one of the sums is not finite.

    Example:
        >>> sqnr_db(1000.0, 1.0), sqnr_db(1.0, 0.0), sqnr_db(0.0, 0.0)
        (30.0, inf, None)
    """
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0:
        return None
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
