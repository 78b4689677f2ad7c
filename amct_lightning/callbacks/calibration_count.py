"""When the processes of a training agree on freshly calibrated ranges."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from amct_lightning.callbacks.modes import train_quantizers
from amct_lightning.modules.calibration import synchronize_calibration
from amct_lightning.plan import find_plan
from amct_lightning.quantizers import ActivationQuantizer


class CalibrationCount:
    """Counts the training batches since a calibration began.

    Counting batches, not looking at quantizers, makes all processes enter the collective at the same batch.

    Attributes:
        steps: Number of training batches since the calibration in progress began; 0 if none is.
        done: Whether every quantizer that is to calibrate has done so, on every process.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.done = True
        self._batch_num = 1
        self._observing: Set[ActivationQuantizer] | None = None

    def begin(self, model: nn.Module) -> None:
        """Prepare for a training; a calibration in progress goes on.

        Args:
            model: The converted module.
        """
        found = find_plan(model)
        self._batch_num = found[1].config.batch_num if found else 1
        self._observing = None
        train_quantizers(model)

    def start_batch(self, model: nn.Module, observing: Set[ActivationQuantizer], anew: bool) -> None:
        """Let no quantizer miss its calibration.

        Args:
            model: The converted module.
            observing: The quantizers that may calibrate by now; the same ones on every process.
            anew: Whether a calibration begins with this batch that goes over an old one.
        """
        if anew:
            self.steps = 0
        if anew or observing != self._observing:
            self._observing = observing
            self.done = not any(quantizer.calibrating for quantizer in observing)
        if not self.done:
            train_quantizers(model)

    def end_batch(self, model: nn.Module) -> bool:
        """Let the processes agree if a calibration ends with this batch.

        Args:
            model: The converted module.

        Returns:
            Whether they have agreed.
        """
        if self.done:
            return False
        self.steps += 1
        if self.steps < self._batch_num:
            return False
        synchronize_calibration(model)
        self.done = not any(quantizer.calibrating for quantizer in self._observing or ())
        if self.done:
            self.steps = 0
        return True
