"""The callback that watches the quantization of every layer during training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from amct_lightning.callbacks.monitor.file import MonitorFile
from amct_lightning.callbacks.monitor.layers import Drift, monitored_layers
from amct_lightning.callbacks.monitor.logging import (
    HistogramWriter,
    WorstLayers,
    histogram_writer,
    histograms_of,
    logger_step,
    model_scalars,
    write_histograms,
)
from amct_lightning.callbacks.monitor.sampling import Sampler
from amct_lightning.callbacks.monitor.table import MonitorSummary
from amct_lightning.callbacks.quant_retrain import QuantRetrainCallback
from amct_lightning.files import beside
from amct_lightning.modules.folding import is_sharded
from amct_lightning.monitor_format import FILE_NAME, LayerReading


class QuantMonitor(Callback):
    """Watches how well every layer is quantized, beside a :class:`QuantRetrainCallback`.

    At the last training step of every interval the activations of all quantized layers are measured; the factors are
    read at its end. In between there is no hook on any layer, and the device is read once per interval. Training
    is the same to the bit with and without a monitor.

    What is known of a layer is in :class:`LayerReading`: clips, scale and offset, how many values are clipped, how
    many integer levels are used, the signal to quantization noise ratio (SQNR) of activations and weight, and how far
    the factors have drifted since the calibration. Activations of a layer without a range (not calibrated yet) are not
    known; one that has a range and runs in float is measured as if it were quantized. Layers that read the same
    tensor share a range: the first of them shows it.

    It goes to four places:

    - ``quant_monitor.csv`` in the logger's directory (without a logger: the Trainer's ``default_root_dir``): one line
      per layer and interval. A run that goes on from a checkpoint drops the lines of later steps. Where another run
      has left its file, the name is ``quant_monitor-1.csv`` and so on.
    - All loggers, as scalars: of the model (``quant/sqnr_input_db_min``, ``quant/sqnr_input_db_mean``, the same of
      ``sqnr_weight_db``; ``quant/saturation_max``, ``quant/clip_drift_max``, ``quant/weight_scale_drift_max``) and of
      the worst layers (``quant/sqnr_input_db/<layer>`` and so on). A layer that was once among the ``worst_k`` of a
      metric stays in the log, so that its curve has no holes. Infinite values are left out.
    - Other callbacks, such as EarlyStopping: the scalars of the model can be monitored.
    - TensorBoard and Weights & Biases, as histograms: the clips over all layers (``quant/clip_max``,
      ``quant/clip_min``) and the weight scales of the layers with the worst weights (``quant/weight_scale/<layer>``).

    In code compiled by ``torch.compile`` activations cannot be seen; a warning says so, and the factors and the
    weights are watched all the same. With several processes the statistics are those of all.

    Args:
        every_n_steps: Optimizer steps (``global_step``) per interval; ``None`` is the Trainer's ``log_every_n_steps``,
            and if that is 0, nothing is watched.
        worst_k: Number of layers per metric that count as the worst.
        histograms: Whether to write histograms.
        csv: Whether to write ``quant_monitor.csv``.
        verbose: Whether to print the worst layers when the training ends.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = QuantMonitor(every_n_steps=2, verbose=False)
        >>> trainer = Trainer(
        ...     callbacks=[QuantRetrainCallback(), monitor], max_steps=4, accelerator="cpu", logger=False,
        ...     default_root_dir=tempfile.mkdtemp(), enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> [reading.layer for reading in monitor.summary().readings]
        ['layer']
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        worst_k: int = 5,
        histograms: bool = True,
        csv: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        _check_number("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1)
        _check_number("worst_k", worst_k, 0)
        self.every_n_steps = every_n_steps
        self.worst_k = worst_k
        self.histograms = histograms
        self.csv = csv
        self.verbose = verbose
        self._module: pl.LightningModule | None = None
        self._forget()

    def _forget(self) -> None:
        self._drift = Drift()
        self._worst = WorstLayers(self.worst_k)
        self._sampler = Sampler([], torch.device("cpu"))
        self._file: MonitorFile | None = None
        self._mark: dict[str, int] | None = None  # of the file that an earlier training has written to
        self._writers: list[HistogramWriter] = []
        self._last = MonitorSummary(0, ())
        self._interval = 0  # length
        self._ended = 0  # number of intervals
        self._begun = 0  # step at which the training began
        self._step = 0  # at the start of the batch
        self._stride = 1  # steps per batch that steps: several with several optimizers
        self._has_warned = False

    def summary(self, limit: int | None = None) -> MonitorSummary:
        """Return the findings of the last interval, which show themselves as a table, the worst layers first.

        Args:
            limit: Number of layers that the table shows, ``None`` for all.
        """
        return MonitorSummary(self._last.step, self._last.readings, limit)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say so if the Trainer quantizes nothing; begin anew with another model."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, QuantRetrainCallback) for callback in callbacks):
            rank_zero_warn(
                "QuantMonitor watches layers that QuantRetrainCallback quantizes, but the Trainer has no "
                "QuantRetrainCallback, so nothing is watched. To quantize, add one: "
                "Trainer(callbacks=[QuantRetrainCallback(...), QuantMonitor()])."
            )
        if self._module is not pl_module:
            self._forget()
            self._module = pl_module

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the layers, which are converted and on their device now, and for places to write to."""
        rows = monitored_layers(pl_module)
        self._sampler.detach()
        self._sampler, self._interval = Sampler(rows, pl_module.device), 0
        if not rows:
            return
        self._drift.adopt(rows)
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # A fast_dev_run is to try everything out, and to leave nothing behind.
        self._interval = 1 if trainer.fast_dev_run else self.every_n_steps or log_every  # type: ignore[attr-defined]
        self._begun = trainer.global_step
        self._ended = self._begun // max(1, self._interval)
        folder = trainer.log_dir  # all processes have to ask for it
        self._mark = self._mark if self._file is None else self._file.mark
        self._file, self._writers = None, []
        if self._interval and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin_writing(trainer, folder or trainer.default_root_dir)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the coming batch if it is the last of its interval."""
        if not self._interval:
            return
        self._sampler.detach()
        self._drift.note(self._sampler.rows)
        self._step = trainer.global_step
        if (self._step + self._stride) // self._interval > self._ended:
            self._sampler.attach()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the interval if its last step is done, which gradient accumulation may put off."""
        if not self._interval:
            return
        was_sampled = self._sampler.attached
        self._sampler.detach()
        self._drift.note(self._sampler.rows)
        step = trainer.global_step
        self._stride = step - self._step or self._stride
        if was_sampled and step // self._interval > self._ended:
            self._ended = step // self._interval
            self._report(trainer, pl_module, self._sampler.collect(self._drift, trainer.world_size > 1))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no hook behind if the LightningModule has cut the epoch short."""
        self._sampler.detach()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no hook behind, and no line unwritten."""
        self._sampler.detach()
        self._finish_file()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the worst layers."""
        if not self.verbose or not self._interval or trainer.global_step == self._begun:
            return
        if self._last.step > self._begun:
            file = "" if self._file is None else f"\nAll intervals are in '{self._file.path}'."
            rank_zero_info(f"QuantMonitor: {self.summary(max(1, self.worst_k))}{file}")
        else:
            rank_zero_info(
                f"QuantMonitor: the training ended before the {self._interval} steps of an interval, so nothing was "
                "watched. Make it shorter with every_n_steps."
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and no line unwritten."""
        self._sampler.detach()
        self._finish_file()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave no line unwritten that a run will look for when it goes on from this checkpoint."""
        self._finish_file()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold: the factors of the calibration, and the layers with a curve."""
        return {
            **self._drift.state(),
            "shown": {metric: list(names) for metric, names in self._worst.shown.items()},
            "stride": self._stride,
            "file": self._mark if self._file is None else self._file.mark,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._drift.load(state_dict)
        self._worst.shown = {metric: list(names) for metric, names in state_dict["shown"].items()}
        self._stride = state_dict["stride"]
        self._file, self._mark = None, state_dict.get("file")  # earlier versions did not keep it

    def _begin_writing(self, trainer: pl.Trainer, folder: str) -> None:
        if self.csv:
            self._file = MonitorFile(beside(folder, FILE_NAME))
            self._file.begin(trainer.global_step, self._mark if trainer.global_step else None)
        if self.histograms:
            self._writers = [writer for writer in map(histogram_writer, trainer.loggers) if writer is not None]

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, readings: list[LayerReading]) -> None:
        self._last = MonitorSummary(trainer.global_step, tuple(readings))
        self._warn_unseen(readings)
        of_model, of_layers = model_scalars(readings), self._worst.scalars(readings)
        if not trainer.barebones:
            # Lightning goes through all that was logged with every batch. That is why the loggers get these directly.
            pl_module.log_dict(of_model, logger=False, on_step=True, on_epoch=False, batch_size=1)
        is_written = bool(self._writers) or (self.histograms and is_sharded(pl_module))  # then all ranks gather weights
        histograms = histograms_of(readings, self._sampler.rows, self._worst) if is_written else {}
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics({**of_model, **of_layers}, logger_step(trainer))
        if self._file is not None:
            self._file.append(self._last.step, trainer.current_epoch, self._last.readings)
        if self._writers:
            write_histograms(self._writers, histograms, logger_step(trainer))

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.flush()

    def _warn_unseen(self, readings: list[LayerReading]) -> None:
        has_range = any(reading.clip_max is not None for reading in readings)
        if has_range and not self._has_warned and all(reading.utilisation is None for reading in readings):
            self._has_warned = True
            rank_zero_warn(
                f"QuantMonitor saw no activations in step {self._last.step}, only factors and weights: the quantized "
                "layers did not run, or they run in code compiled by torch.compile, which cannot be looked into."
            )


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"QuantMonitor({name}={value!r}): must be an integer.")
    if value < least:
        raise ValueError(f"QuantMonitor({name}={value!r}): must be {least} or more.")
