"""What a quantizer of activations notes on its device, for somebody to read when the host waits anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.transforms import transforming


class FlaggedQuantizer(Quantizer):
    """A quantizer whose flags are raised on the device, without reading anything.

    They are no buffers: DDP would overwrite every rank's flags with those of rank zero.

    Attributes:
        poison: 0, or NaN once a NaN or infinite value was seen in training, 0-d float32.
        degenerate: Whether the last calibration found no values to make a range of, 0-d float32: 0 if it did. ``None``
            if nobody needs to look, as none has ended since the last time.
    """

    poison: Tensor
    degenerate: Tensor | None

    def reset_flags(self, device: torch.device) -> None:
        """Lower the flags.

        Args:
            device: Where they are from now on.
        """
        self.poison = torch.zeros((), device=device)
        self.degenerate = None

    @property
    def nonfinite(self) -> Tensor:
        """Whether a NaN or infinite value was seen in training, 0-d bool; :meth:`forget_nonfinite` resets it."""
        return torch.isnan(self.poison)

    @torch.no_grad()
    def forget_nonfinite(self) -> None:
        """Start anew to look for NaN and infinite values."""
        self.poison.zero_()

    @torch.no_grad()
    def watch(self, values: Tensor, upper: Tensor | None = None, lower: Tensor | None = None) -> None:
        """Poison the quantizer's flag, without reading it, if a value is NaN or infinite.

        Args:
            values: Floating tensor on the quantizer's device.
            upper: Upper clip that belongs to it.
            lower: Lower clip.
        """
        if values.numel() == 0 or transforming():
            return
        smallest, largest = torch.aminmax(values)
        width = largest.float() - smallest.float()
        if upper is not None and lower is not None:
            width = width.add_(upper).sub_(lower)
        self.poison.add_(width.mul_(0))  # 0 times anything is 0, but for infinity and NaN, of which it is NaN

    def _move_extra(self, move: Callable[[Tensor], Tensor]) -> None:
        self.poison = move(self.poison)
        self.degenerate = None if self.degenerate is None else move(self.degenerate)
