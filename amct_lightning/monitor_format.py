"""What QuantMonitor and the phases of the schedule are called in files and logs, for those who write and who read."""

from __future__ import annotations

from dataclasses import dataclass, fields

FILE_NAME = "quant_monitor.csv"

PREFIX = "quant/"
"""The names of the monitor's metrics begin with it."""

PHASE_METRIC = "quant_phase"

PHASES = ("float", "calibrating", "learning", "frozen")
"""The values 0, 1, ... of the metric ``quant_phase`` in words."""


@dataclass(frozen=True)
class LayerReading:
    """The state of one quantized layer; ``None`` is not known. Its fields are columns of ``quant_monitor.csv``.

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


COLUMNS = ("step", "epoch", *(field.name for field in fields(LayerReading)))
"""The columns of ``quant_monitor.csv``; they never change during a run."""
