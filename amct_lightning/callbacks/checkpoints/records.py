"""The side of the callback that faces checkpoints: what goes into them, what comes out, and the record files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from amct_lightning.callbacks.averaging import averaged_modules
from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.checkpoints.io import RecordCheckpointIO, copy_records_of_links
from amct_lightning.callbacks.checkpoints.state import adopt_plan, make_entry, record_of, restore_observed
from amct_lightning.callbacks.checks import find_submodule
from amct_lightning.callbacks.training import Training
from amct_lightning.checkpoint_file import CHECKPOINT_KEY
from amct_lightning.files import write_text


class CheckpointSide(Callback):
    """Base of :class:`QuantRetrainCallback`; a :class:`RecordCheckpointIO` calls it for every checkpoint.

    Attributes:
        config: What the user gave as configuration.
        submodule: Dotted name of the converted part of the LightningModule, ``None`` for all of it.
    """

    config: Any
    submodule: str | None

    def __init__(self) -> None:
        super().__init__()
        self._model: nn.Module | None = None
        self._record_path = Path("record.txt")
        self._missing_config: FileNotFoundError | None = None
        self._calibration = CalibrationCount()
        self._is_fitting = False
        self._training: Training | None = None
        self._loaded_entry: dict[str, Any] = {}
        self._writes_record = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put plan, calibration state and record into the checkpoint, and frozen factors into averages of weights."""
        if self._training is not None:
            self._training.settle_averages()
        copy_records_of_links(trainer.checkpoint_callbacks)
        state = self.checkpoint_state()
        if state is not None:
            checkpoint[CHECKPOINT_KEY] = state

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back batches that a calibration in progress had observed."""
        entry = self._loaded_entry = checkpoint.get(CHECKPOINT_KEY, {})
        self._calibration.steps = entry.get("calibration_steps", 0)
        restore_observed(self._converted(), entry)
        if entry:
            for average in averaged_modules(trainer):  # whose states other callbacks are about to load
                adopt_plan(find_submodule(average, self.submodule), entry, "checkpoint", replace=True)
        if self._training is not None:  # as the searches for learning rate and batch size do
            self._training.forget()

    def checkpoint_state(self) -> dict[str, Any] | None:
        """Return what a checkpoint has to hold beside the weights, or ``None`` without a converted model."""
        return None if self._model is None else make_entry(self._model, self.submodule, self._calibration.steps)

    def record_of(self, tensors: Mapping[str, Tensor], text: str | None) -> str | None:
        """Return the record that belongs to the tensors of a checkpoint.

        Args:
            tensors: The ``state_dict`` in the checkpoint.
            text: The record of the model as it is.
        """
        prefix = f"{self.submodule}." if self.submodule else ""
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return record_of(self._converted(), own, text)

    def record_saved(self, text: str | None) -> None:
        """Write ``record_file``; without a usable record, and in a ``fast_dev_run``, the last written one stays.

        Args:
            text: The record, or ``None``.
        """
        if text is not None and self._writes_record:
            write_text(self._record_path, text)

    def checkpoint_loaded(self, state: dict[str, Any] | None, source: str) -> None:
        """Convert a model that waits for the plan of its checkpoint; refuse a checkpoint with another plan.

        Args:
            state: The checkpoint's entry of this package, ``None`` if it has none.
            source: The checkpoint's path.

        Raises:
            ValueError: If model and checkpoint are quantized differently.
        """
        if self._model is None:
            return
        if state is not None:
            adopt_plan(self._model, state, source, replace=self.config is None)
            self._missing_config = None
        elif self._is_fitting:
            raise ValueError(
                f"'{source}' was written without QuantRetrainCallback, so the state of its optimizer does not fit the "
                "quantized model. Load the float weights into the LightningModule, and fit without ckpt_path."
            )

    def _restore_observed(self) -> None:
        """Take back observed batches again; a callback that averages weights has loaded the model once more."""
        if self._loaded_entry:
            restore_observed(self._converted(), self._loaded_entry)
        self._loaded_entry = {}

    def _wrap_checkpoint_io(self, trainer: pl.Trainer) -> None:
        self._loaded_entry = {}
        self._writes_record = not trainer.fast_dev_run  # type: ignore[attr-defined]
        inner = trainer.strategy.checkpoint_io
        if isinstance(inner, RecordCheckpointIO):
            inner.owner = self
        else:
            trainer.strategy.checkpoint_io = RecordCheckpointIO(inner, self)

    def _require_conversion(self) -> None:
        if self._missing_config is not None:
            raise self._missing_config

    def _converted(self) -> nn.Module:
        self._require_conversion()
        if self._model is None:
            raise RuntimeError("QuantRetrainCallback has no model yet: it is used outside of a Trainer run.")
        return self._model
