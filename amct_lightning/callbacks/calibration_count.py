"""When the processes of a training in Lightning agree on freshly calibrated ranges."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules.calibration import Agreement
from amct_lightning.modules.degenerate import OnDegenerate, set_on_degenerate
from amct_lightning.quantizers import ActivationQuantizer


class CalibrationCount(Agreement):
    """The count of calibration batches in the trainings of a callback; it outlives each of them.

    Args:
        on_degenerate: What the calibrations do with batches without values.
    """

    def __init__(self, on_degenerate: OnDegenerate = "amct") -> None:
        super().__init__()
        self.on_degenerate = on_degenerate

    def begin(self, model: nn.Module) -> None:
        """Prepare for a training; a calibration in progress goes on.

        Args:
            model: The converted module.
        """
        found = find_plan(model)
        self.batch_num = found[1].config.batch_num if found else 1
        set_on_degenerate(model, self.on_degenerate)

    def start_batch(self, observing: Set[ActivationQuantizer], anew: bool) -> None:
        """Note whose calibrations count.

        Args:
            observing: The quantizers that may calibrate by now; the same ones on every process.
            anew: Whether a calibration begins with this batch that goes over an old one.
        """
        self.quantizers = observing
        if anew:
            self.steps = 0
