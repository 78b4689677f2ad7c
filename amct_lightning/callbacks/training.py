"""What happens in the steps of one training: phases, calibration, and the look-out for NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from amct_lightning.callbacks.averaging import Averages
from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.modes import compile_anew
from amct_lightning.callbacks.nonfinite import NonfiniteWatch
from amct_lightning.callbacks.optimizers.outside import OutsideWrites
from amct_lightning.callbacks.optimizers.param_groups import ClipGroups
from amct_lightning.callbacks.schedule.checks import number_of_epochs, warn_beyond_end
from amct_lightning.callbacks.schedule.phases import PhaseRunner
from amct_lightning.callbacks.schedule.schedule import Phase, Position, QuantSchedule
from amct_lightning.callbacks.schedule.scores import begins_to_quantize, restart_scores
from amct_lightning.monitor_format import PHASE_METRIC


class Training:
    """One run of a training loop with a converted model.

    Args:
        trainer: The Trainer, its optimizers set up.
        model: The converted module.
        schedule: When to do what.
        max_epochs: Number of epochs that the user wants; StochasticWeightAveraging lets the Trainer make one more.
        calibration: The count of calibration batches, which outlives a training.
        on_nonfinite: See :class:`QuantRetrainCallback`.
        groups: The parameter groups of the clips.

    Attributes:
        phases: The phases of the layers.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        model: nn.Module,
        schedule: QuantSchedule,
        max_epochs: int | None,
        calibration: CalibrationCount,
        on_nonfinite: Literal["warn", "raise"],
        groups: ClipGroups,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.max_epochs = max_epochs
        self.groups = groups
        begin = Position(trainer.current_epoch, max_epochs=max_epochs)
        self.phases = PhaseRunner(schedule, model, begin)
        warn_beyond_end(schedule, max_epochs, number_of_epochs(trainer, max_epochs))
        self.calibration.begin(model)
        self.averages = Averages(trainer, model)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._outside = OutsideWrites(trainer.lightning_module, model, interval)
        self._watch = NonfiniteWatch(model, interval, on_nonfinite, self._outside)
        self._logged: Phase | None = None
        self._told = ""
        self._stop_showing = show_in_progress_bar(trainer, self.phases)

    def start_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: int) -> None:
        """Bring the layers into their phases; note which step the coming forwards belong to.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule.
            batch: Number of the batch in its epoch.
        """
        self._outside.start_batch(batch)
        self.groups.follow(trainer.optimizers)
        at = Position(trainer.current_epoch, batch, trainer.global_step, self.max_epochs)
        self.averages.start_batch()
        schedule = self.phases.schedule
        if schedule.restart_scores and begins_to_quantize(schedule, self.phases.layers, at):
            restart_scores(trainer)
        anew = self.phases.start_batch(at)
        self.calibration.start_batch(self.phases.observing, anew)
        self._watch.start_batch(trainer.global_step)
        phase, text = self.phases.look()
        if phase is not self._logged or batch == 0:  # Lightning keeps a value until the end of the epoch
            pl_module.log(PHASE_METRIC, float(phase), on_step=True, on_epoch=False, batch_size=1)
            self._logged = phase
        if text != self._told:
            rank_zero_info(f"QuantRetrainCallback: epoch {at.epoch}, batch {batch}: {text}")
            self._told = text

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Get ready for parameters to be written: by an optimizer, or by a loop of the user's.

        Args:
            trainer: The Trainer.
        """
        is_manual = not trainer.lightning_module.automatic_optimization
        self.phases.after_backward(is_manual)
        if is_manual:
            self.groups.derive(trainer.optimizers)

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep an optimizer off frozen factors, and give it the rates of the clips.

        Args:
            optimizer: The optimizer that is about to step.
        """
        self.phases.before_step(optimizer)
        self.groups.derive([optimizer])

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Let the processes agree on fresh calibrations, once; report non-finite activations at the interval.

        Args:
            trainer: The Trainer.
        """
        self.groups.derive(trainer.optimizers)  # after the schedulers, for callbacks that show the rates
        self.phases.end_batch(trainer.global_step)
        if self.calibration.end_batch(self.model, last=trainer.is_last_batch):
            self.phases.forget()
            if self.calibration.done:
                self._watch.check(interval_goes_on=True)
                compile_anew(trainer.lightning_module)
        self._watch.end_batch()
        self.averages.end_batch()
        self._outside.end_batch(self.calibration.done)
        if trainer.is_last_batch:  # an average may be put in place when the next epoch begins
            self.settle_averages()

    def settle_averages(self) -> None:
        """Bring the averages that other callbacks make up to date, and frozen factors; they are about to be used."""
        self.phases.restore()
        self.averages.settle(self.phases)

    def end(self) -> None:
        """Let go of the Trainer; look a last time for NaN and infinite activations."""
        self.calibration.end(self.model)
        self.averages.end_batch()
        self.settle_averages()
        self.close()
        self._watch.check()

    def close(self) -> None:
        """Let go of the Trainer."""
        self.phases.end()
        self._stop_showing()


def show_in_progress_bar(trainer: pl.Trainer, phases: PhaseRunner) -> Callable[[], None]:
    """Add the phase to what the Trainer's progress bar shows; Lightning's own metrics can be numbers only.

    Args:
        trainer: The Trainer.
        phases: Knows the phase.

    Returns:
        A function that takes it away again.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return lambda: None
    original = bar.get_metrics

    def get_metrics(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), "quant": phases.phase.name.lower()}

    # get_metrics is Lightning's documented place to change what is shown; a callback reaches it on the instance only.
    bar.get_metrics = get_metrics  # type: ignore[method-assign]
    return lambda: bar.__dict__.pop("get_metrics", None)
