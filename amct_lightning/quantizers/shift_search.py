"""Search-N: by how many bits hardware has to shift the int32 sums of a layer so that they lose least in int16."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.functional import half_range, quantize

MAX_SHIFT = 16


def shift_errors(y: Tensor, scale: Tensor) -> Tensor:
    """Return the squared error of every shift, summed over all values of a channel.

    With ``S = clamp(round(y / scale), int32)`` the error of shift ``N`` is
    ``sum((S - clamp(floor(S / 2^N), int16) * 2^N)^2)``.

    Args:
        y: Output of a quantized layer, float, channels on axis 1.
        scale: ``scale_d * scale_w``: one per channel or a single one, 1-d float32.

    Returns:
        Sums for the shifts 1..16 on axis 0 and the channels on axis 1, float32.

    Example:
        >>> shift_errors(torch.tensor([[5.0, 8.0]]), torch.tensor([1.0, 1.0]))[:3]
        tensor([[ 1.,  0.],
                [ 1.,  0.],
                [25.,  0.]])
    """
    per_channel = scale.numel() > 1
    shaped = scale.view([1, -1] + [1] * (y.dim() - 2)) if per_channel else scale.view(())
    dims = [dim for dim in range(y.dim()) if dim != 1 or not per_channel]
    sums, h = quantize(y.float(), shaped, 32), half_range(16)
    errors = []
    for shift in range(1, MAX_SHIFT + 1):
        kept = torch.floor(sums / 2**shift).clamp_(-h, h - 1).mul_(2**shift)
        errors.append(kept.sub_(sums).square_().sum(dims).view(-1))
    return torch.stack(errors)


def best_shifts(errors: Tensor) -> Tensor:
    """Return the shift with the smallest error of every channel, the largest one among equals.

    Args:
        errors: What :func:`shift_errors` gives, summed over any number of batches.

    Returns:
        Shifts in 1..16, 1-d int64.

    Example:
        >>> best_shifts(shift_errors(torch.tensor([[5.0, 8.0]]), torch.tensor([1.0, 1.0])))
        tensor([2, 3])
    """
    return MAX_SHIFT - errors.flip(0).argmin(0)


class ShiftSearch(Quantizer):
    """Add up the errors of all shifts over the batches of an evaluation.

    The first batch after a training step, or after :meth:`reset`, starts anew.

    Args:
        channels: Number of weight scales in the record: that of the output channels, or 1.

    Attributes:
        errors: Summed errors, float32, shifts on axis 0 and channels on axis 1.
        batches: Number of batches seen, 0-d int64; negative while ``stale``, which is part of the state in this way.
        enabled: Whether batches are counted.

    Example:
        >>> search = ShiftSearch(channels=2)
        >>> search.update(torch.tensor([[5.0, 8.0]]), torch.tensor([1.0, 1.0]))
        >>> search.shift_bit()
        [2, 3]
    """

    errors: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("errors", torch.zeros(MAX_SHIFT, channels, dtype=torch.float32))
        self.register_buffer("batches", torch.tensor(0))
        self._stale = False
        self.enabled = True

    @property
    def stale(self) -> bool:
        """Whether the next batch starts anew, as the layer was trained; until then the shifts are the old ones."""
        return self._stale

    @stale.setter
    def stale(self, stale: bool) -> None:
        if stale != self._stale:
            with torch.no_grad():
                self.batches.neg_()
            self._stale = stale

    @torch.no_grad()
    def update(self, y: Tensor, scale: Tensor) -> None:
        """Count a batch.

        Args:
            y: Output of the layer, float, channels on axis 1.
            scale: ``scale_d * scale_w``, 1-d float32.
        """
        if not self.enabled:
            return
        if self.stale:
            self.reset()
        self.errors.add_(shift_errors(y, scale))
        self.batches.add_(1)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all batches."""
        self.errors.zero_()
        self.batches.zero_()
        self._stale = False

    def reset_parameters(self) -> None:
        """Forget all batches, as :meth:`reset` does."""
        self.reset()

    def shift_bit(self) -> list[int]:
        """Return the best shifts, or nothing if no batch was seen."""
        return best_shifts(self.errors).tolist() if int(self.batches) else []

    def _after_load(self) -> None:
        self._stale = bool(self.batches < 0)
