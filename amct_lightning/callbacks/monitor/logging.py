"""What of a monitor's findings goes to the loggers: scalars of the worst layers, histograms of all."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from amct_lightning.callbacks.monitor.layers import MonitoredLayer
from amct_lightning.monitor_format import PREFIX, LayerReading

LOW_IS_BAD = ("sqnr_input_db", "sqnr_weight_db")
HIGH_IS_BAD = ("saturation", "clip_drift", "weight_scale_drift")

HistogramWriter = Callable[[str, Tensor, int], object]
"""Takes name, values and step."""


class WorstLayers:
    """Which layers have curves of their own: those that were among the worst of a metric at any time.

    A layer keeps its curve when others become worse, so that curves have no holes.

    Args:
        k: How many layers count as the worst ones of a metric.

    Attributes:
        shown: Metric -> names of the layers with a curve.

    Example:
        >>> worst = WorstLayers(1)
        >>> first = [LayerReading("a", sqnr_input_db=10.0), LayerReading("b", sqnr_input_db=20.0)]
        >>> worst.scalars(first)
        {'quant/sqnr_input_db/a': 10.0}
        >>> worst.scalars([LayerReading("a", sqnr_input_db=11.0), LayerReading("b", sqnr_input_db=9.0)])
        {'quant/sqnr_input_db/a': 11.0, 'quant/sqnr_input_db/b': 9.0}
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.shown: dict[str, list[str]] = {}

    def scalars(self, readings: Sequence[LayerReading]) -> dict[str, float]:
        """Return the scalars of the layers that have a curve, after adding the worst ones of now.

        Args:
            readings: The findings.
        """
        found: dict[str, float] = {}
        for metric in (*LOW_IS_BAD, *HIGH_IS_BAD):
            values = _finite(readings, metric)
            shown = self.shown.setdefault(metric, [])
            shown += [name for name in _worst(values, metric, self.k) if name not in shown]
            found.update({f"{PREFIX}{metric}/{tag(name)}": values[name] for name in shown if name in values})
        return found


def model_scalars(readings: Sequence[LayerReading]) -> dict[str, float]:
    """Return the scalars of the whole model; those of which nothing is known are left out.

    Args:
        readings: The findings.

    Example:
        >>> model_scalars([LayerReading("a", sqnr_input_db=10.0), LayerReading("b", sqnr_input_db=20.0)])
        {'quant/sqnr_input_db_min': 10.0, 'quant/sqnr_input_db_mean': 15.0}
    """
    found: dict[str, float] = {}
    for metric in LOW_IS_BAD:
        values = _finite(readings, metric).values()
        if values:
            found[f"{PREFIX}{metric}_min"] = min(values)
            found[f"{PREFIX}{metric}_mean"] = math.fsum(values) / len(values)
    for metric in HIGH_IS_BAD:
        values = _finite(readings, metric).values()
        if values:
            found[f"{PREFIX}{metric}_max"] = max(values)
    return found


def tag(layer: str) -> str:
    """Return a layer's name as loggers take it.

    Example:
        >>> tag("encoder.lstm (hidden state)")
        'encoder.lstm.hidden_state'
    """
    return layer.replace(" (hidden state)", ".hidden_state")


def histogram_writer(logger: Logger) -> HistogramWriter | None:
    """Return what writes a histogram (name, values, step) to a logger, or ``None`` if it has no histograms.

    Args:
        logger: TensorBoard's, or one with an ``experiment`` like it; or that of Weights & Biases.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> histogram_writer(CSVLogger(tempfile.mkdtemp())) is None
        True
    """
    wandb = sys.modules.get("wandb")  # its logger has imported it
    if wandb is not None and any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__):
        return lambda name, values, step: logger.log_metrics({name: wandb.Histogram(values.numpy())}, step)
    add_histogram: HistogramWriter | None = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    return add_histogram


def histograms_of(
    readings: Iterable[LayerReading], rows: Iterable[MonitoredLayer], worst: WorstLayers
) -> dict[str, Tensor]:
    """Return what is shown as histograms: the clips of all layers, the weight scales of those with the worst weights.

    Args:
        readings: The findings.
        rows: The layers.
        worst: Knows the worst of them.
    """
    values = {
        name: torch.tensor([value for reading in readings if (value := getattr(reading, name)) is not None])
        for name in ("clip_max", "clip_min")
    }
    shown = {name for metric in ("sqnr_weight_db", "weight_scale_drift") for name in worst.shown[metric]}
    for row in rows:
        weight = row.weight if row.name in shown else None
        if weight is not None:
            values[f"weight_scale/{tag(row.name)}"] = row.weight_quantizer.compute_scale(weight).cpu()
    return values


def write_histograms(writers: Iterable[HistogramWriter], values: Mapping[str, Tensor], step: int) -> None:
    """Write one histogram per name.

    Args:
        writers: From :func:`histogram_writer`.
        values: Name -> values, on the CPU; those that are not finite are left out.
        step: The step.
    """
    for name, tensor in values.items():
        finite = tensor[torch.isfinite(tensor)]
        for writer in writers if finite.numel() else ():
            writer(PREFIX + name, finite, step)


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning gives its loggers at the end of the present batch.

    It counts batches that stepped, whatever the number of optimizers, and is private (seen in Lightning 2.5 and 2.6).
    Curves with another count would not line up with those of ``self.log``.

    Args:
        trainer: The Trainer, in ``on_train_batch_end``.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step - 1))


def _finite(readings: Iterable[LayerReading], metric: str) -> dict[str, float]:
    values = {reading.layer: getattr(reading, metric) for reading in readings}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _worst(values: Mapping[str, float], metric: str, k: int) -> list[str]:
    if metric in LOW_IS_BAD:
        return sorted(values, key=lambda name: values[name])[:k]
    bad = [name for name in values if values[name] > 0]  # no saturation and no drift are not bad
    return sorted(bad, key=lambda name: -values[name])[:k]
