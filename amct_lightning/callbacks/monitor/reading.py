"""From sums and factors on a device to what a monitor knows of a layer, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from amct_lightning.callbacks.monitor.layers import FACTORS
from amct_lightning.callbacks.monitor.metric import SUMS
from amct_lightning.monitor_format import LayerReading

_COLUMNS = (*SUMS, "lowest", "highest", *FACTORS)


def reading_of(layer: str, num_bits: int, values: Sequence[float]) -> LayerReading:
    """Make a reading of the sums and factors of a layer.

    Args:
        layer: Its name.
        num_bits: Number of bits of the activations.
        values: ``SUMS``, lowest and highest code, ``FACTORS``.

    Example:
        >>> values = [4.0, 0.0, 1.0, 100.0, 1.0, -8.0, -1.0, *[float("nan")] * 9]
        >>> reading = reading_of("conv", 4, values)
        >>> reading.saturation, reading.utilisation, reading.sqnr_input_db, reading.clip_max
        (0.25, 0.5, 20.0, None)
    """
    raw = dict(zip(_COLUMNS, values, strict=True))
    elements = raw["elements"]
    known = {field.name: _known(raw[field.name]) for field in fields(LayerReading) if field.name in raw}
    return LayerReading(
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
