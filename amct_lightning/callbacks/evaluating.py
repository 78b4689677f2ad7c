"""What the callback does when the model is evaluated: look after it, and search the shifts of its sums."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from amct_lightning.callbacks.checkpoints.hooks import CheckpointHooks
from amct_lightning.callbacks.converting.watch import ModuleWatch
from amct_lightning.callbacks.modes import begin_evaluation
from amct_lightning.modules.shift_hook import synchronize_shift_search


class EvaluationHooks(CheckpointHooks):
    """The hooks of :class:`QuantRetrainCallback` around validation, test and prediction."""

    search_n: bool

    def __init__(self) -> None:
        super().__init__()
        self._watch: ModuleWatch | None = None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted; start the search of the shifts anew."""
        self._look()
        begin_evaluation(self._converted(), searches=not trainer.sanity_checking)
        if self._training is not None:
            self._training.settle_averages()  # they are evaluated in place of the model

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up what the processes have found for the shifts; outside of a training, write it down."""
        self._finish_shift_search(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted; start the search of the shifts anew."""
        self._look()
        begin_evaluation(self._converted(), searches=True)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up what the processes have found for the shifts; outside of a training, write it down."""
        self._finish_shift_search(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted."""
        self._look()
        begin_evaluation(self._converted(), searches=False)

    def _look(self, hooks: str | None = None) -> None:
        if self._watch is not None:
            self._watch.look(hooks)

    def _finish_shift_search(self, trainer: pl.Trainer) -> None:
        if not trainer.sanity_checking:
            synchronize_shift_search(self._converted())
        if self.search_n and not self._run.is_fitting:
            self._write_record(trainer)
