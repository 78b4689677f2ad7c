"""Report NaN and infinite activations with layer and step, and ranges without values.

The device is read at the logging interval and when a calibration ends, once for all.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from amct_lightning.callbacks.optimizers.outside import OutsideWrites
from amct_lightning.modules import activation_quantizers
from amct_lightning.modules.degenerate import degenerate_message, flags_of, take_degenerate
from amct_lightning.wording import cut_off

_MOST_NOTED = 64
"""Number of batches after which their flags are counted, however long the interval is."""


class NonfiniteWatch:
    """Reads the flags that the activation quantizers raise on their device.

    Args:
        model: The converted model.
        interval: Number of batches between two looks.
        reaction: ``"warn"`` once per layer, or ``"raise"``.
        outside: Has flags of its own to be read along.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int,
        reaction: Literal["warn", "raise"],
        outside: OutsideWrites | None = None,
    ) -> None:
        self.model = model
        self.quantizers = activation_quantizers(model)
        self.interval = max(1, interval)
        self.reaction = reaction
        self.steps: list[int] = []
        self.reported: set[str] = set()
        self._ages = torch.zeros(())
        self._poisons: list[Tensor] = []  # of batches that are not counted yet
        self._is_scattered = self._find_devices()
        self._outside = outside

    def start_batch(self, step: int) -> None:
        """Note the step of the coming batch: the Trainer's ``global_step``."""
        self.steps.append(step)

    def end_batch(self) -> None:
        """Keep, on the device, what the flags were after this batch; look at them if the interval is over."""
        if self.quantizers:
            self._note()
        if len(self.steps) >= self.interval:
            self.check()

    def check(self, interval_goes_on: bool = False) -> None:
        """Look at the flags now, with one read for all layers.

        Args:
            interval_goes_on: Whether this is an extra look, in the batch that is not ended yet.

        Raises:
            RuntimeError: If a flag is up and the reaction is ``"raise"``.
        """
        if not self.quantizers or not self.steps:
            return
        if interval_goes_on:
            self._note()
        counted = self._count().expand(len(self.quantizers))
        degenerate = take_degenerate(self.model)
        written = [] if self._outside is None else self._outside.take_flags()
        if degenerate:
            counted = torch.cat((counted, flags_of(degenerate, counted.device)))
        if written:
            counted = torch.cat((counted, torch.stack([flag.to(counted.device) for flag in written])))
        numbers = counted.tolist()
        if self._outside is not None:
            self._outside.report(numbers[len(numbers) - len(written) :])
        numbers = numbers[: len(numbers) - len(written)]
        ages = [int(age) for age in numbers[: len(self.quantizers)]]
        found = {
            name: self.steps[max(0, len(self.steps) - age)]
            for name, age in zip(self.quantizers, ages, strict=True)
            if age and name not in self.reported
        }
        if not interval_goes_on:
            self.steps.clear()
        self._ages = torch.zeros_like(self._ages)
        self._is_scattered = self._find_devices()
        for quantizer, age in zip(self.quantizers.values(), ages, strict=True):
            if age:
                quantizer.forget_nonfinite()
        message = degenerate_message(degenerate, numbers[len(self.quantizers) :])
        if message:
            rank_zero_warn(message)
        if found:
            self.reported.update(found)
            self._report(found)

    def _note(self) -> None:
        poisons = [quantizer.poison for quantizer in self.quantizers.values()]
        if self._is_scattered:
            poisons = [poison.to(poisons[0].device, non_blocking=True) for poison in poisons]
        self._poisons.append(torch.stack(poisons))
        if len(self._poisons) >= _MOST_NOTED:
            self._count()

    def _find_devices(self) -> bool:
        """Tell whether the flags are on several devices; each interval asks, not each batch."""
        return len({quantizer.poison.device for quantizer in self.quantizers.values()}) > 1

    def _count(self) -> Tensor:
        """Count, on the device, for how many batches each flag is up by now."""
        if self._poisons:
            self._ages = self._ages + torch.isnan(torch.stack(self._poisons)).float().sum(0)
            self._poisons = []
        return self._ages

    def _report(self, found: dict[str, int]) -> None:
        first = min(found.values())
        layers = cut_off(f"'{name}' (step {step})" for name, step in sorted(found.items(), key=lambda i: i[1]))
        message = (
            f"NaN or infinite values reached the activation quantizer of layer {layers}; first at step {first}. "
            "Check the input data, lower the learning rate, or clip gradients. No record is written while a factor is "
            "not finite."
        )
        if self.reaction == "raise":
            raise RuntimeError(message)
        rank_zero_warn(message)
