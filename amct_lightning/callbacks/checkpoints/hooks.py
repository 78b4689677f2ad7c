"""What the callback does whenever a checkpoint is written or read, and with the record at the end of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from amct_lightning.callbacks.averaging import averaged_modules
from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.checkpoints.records import copy_records_of_links, present_record, record_path
from amct_lightning.callbacks.checkpoints.state import QuantState, warn_of_other_rate
from amct_lightning.callbacks.checks import warn_unfinished
from amct_lightning.callbacks.distill.distillation import Distillation
from amct_lightning.callbacks.exporting.best import best_checkpoint
from amct_lightning.callbacks.training import Training
from amct_lightning.checkpoint_file import CHECKPOINT_KEY


class CheckpointHooks(pl.Callback):
    """The hooks of :class:`QuantRetrainCallback` that keep the model's state and record in files."""

    quant_lr_scale: float
    _calibration: CalibrationCount

    def __init__(self) -> None:
        super().__init__()
        self._state: QuantState | None = None
        self._distillation: Distillation | None = None
        self._training: Training | None = None
        self._has_trained = False

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record of the final state, which other callbacks may have averaged; all ranks wait for it."""
        if self._has_trained:
            self._write_record(trainer)
            if trainer.is_global_zero:
                warn_unfinished(self._converted(), self._calibration.steps, self._run.record.path)
                self._tell_records(trainer)
                self._export(trainer, pl_module)
        copy_records_of_links(trainer.checkpoint_callbacks)
        self._has_trained = False
        trainer.strategy.barrier("QuantRetrainCallback.on_fit_end")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put plan, calibration state and record into the checkpoint, and frozen factors into averages of weights."""
        if self._training is not None:
            self._training.settle_averages()
        copy_records_of_links(trainer.checkpoint_callbacks)
        entry = None if self._state is None else self._state.entry()
        if entry is not None:
            teacher = self._distillation.entry() if self._distillation else {}
            checkpoint[CHECKPOINT_KEY] = entry | {"quant_lr_scale": self.quant_lr_scale} | teacher

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back batches that a calibration in progress had observed."""
        entry = checkpoint.get(CHECKPOINT_KEY, {})
        self._run.restore(entry, averaged_modules(trainer))
        if self._run.is_fitting:
            warn_of_other_rate(entry, self.quant_lr_scale)
        if self._distillation is not None:
            self._distillation.expect(entry.get("teacher"))
        if self._training is not None:  # as the searches for learning rate and batch size do
            self._training.phases.forget()

    def _tell_records(self, trainer: pl.Trainer) -> None:
        """Say which record belongs to which checkpoint: the record file has the factors of the end."""
        best = best_checkpoint(trainer)
        if best is not None:
            rank_zero_info(
                f"QuantRetrainCallback: the best checkpoint is '{best}', its record '{record_path(best)}'. "
                f"'{self._run.record.path}' is the record of the model at the end of the training."
            )

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the trained model, if that is wanted."""

    @property
    def _run(self) -> QuantState:
        if self._state is None:
            raise RuntimeError("QuantRetrainCallback has no model yet: it is used outside of a Trainer run.")
        return self._state

    def _converted(self) -> nn.Module:
        return self._run.converted()

    def _write_record(self, trainer: pl.Trainer) -> None:
        text = present_record(trainer, self._converted())
        if trainer.is_global_zero:
            self._run.record.write(text)
