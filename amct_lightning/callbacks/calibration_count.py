"""When the processes of a training in Lightning agree on freshly calibrated ranges."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules.calibration import Agreement
from amct_lightning.modules.degenerate import OnDegenerate, set_on_degenerate
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.base import several_processes

_PATIENCE = 1024
"""Number of batches for which several processes look for ranges of late layers at 1, 2, 4, ... batches."""


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
        joined = bool(self.quantizers) and observing is not self.quantizers and not observing <= set(self.quantizers)
        self.quantizers = observing
        if anew or joined:
            self.steps = 0

    def end(self, model: nn.Module) -> None:
        """End a training: let the processes agree on ranges of late layers, wherever in an epoch it ends.

        Args:
            model: The converted module.
        """
        if several_processes() and self.unsettled and self.steps >= self.batch_num:
            self._agree(model)

    def _is_due(self, late: int, last: bool, fresh: bool) -> bool:
        """Tell whether the processes look for new ranges: after some time at the end of each epoch only."""
        if several_processes() and late > _PATIENCE:
            return last
        return super()._is_due(late, last, fresh)
