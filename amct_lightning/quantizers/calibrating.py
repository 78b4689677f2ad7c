"""The books of a calibration: what a quantizer has observed, what is left to do, and the flags that it raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.ifmr import has_values, ifmr
from amct_lightning.quantizers.starting.output import Reader, output_range
from amct_lightning.quantizers.starting.percentile import percentile_range
from amct_lightning.quantizers.transforms import transforming

PERCENTILE = 99.99
"""Share of the values, in percent, that are inside of a range if nothing else is said."""


class FlaggedQuantizer(Quantizer):
    """A quantizer whose flags are raised on the device, without reading anything.

    They are no buffers: DDP would overwrite every rank's flags with those of rank zero.

    Attributes:
        poison: 0, or NaN once a NaN or infinite value was seen in training, 0-d float32.
        degenerate: Whether the last calibration found no values to make a range of, 0-d float32: 0 if it did. ``None``
            if nobody needs to look, as none has ended since the last time.
        below_zero: Whether that calibration found negative values for a range that begins with 0, 0-d float32. ``None``
            if the range does not, or this process has calibrated none.
    """

    poison: Tensor
    degenerate: Tensor | None
    below_zero: Tensor | None

    def reset_flags(self, device: torch.device) -> None:
        """Lower the flags.

        Args:
            device: Where they are from now on.
        """
        self.poison = torch.zeros((), dtype=torch.float32, device=device)
        self.degenerate = self.below_zero = None

    @property
    def nonfinite(self) -> Tensor:
        """Whether a NaN or infinite value was seen in training, 0-d bool; :meth:`forget_nonfinite` resets it."""
        return torch.isnan(self.poison)

    @torch.no_grad()
    def forget_nonfinite(self) -> None:
        """Start anew to look for NaN and infinite values."""
        self.poison.zero_()

    @torch.no_grad()
    def watch(self, values: Tensor, width: Tensor | None = None) -> None:
        """Poison the quantizer's flag, without reading it, if a value is NaN or infinite.

        Args:
            values: Floating tensor on the quantizer's device.
            width: The width of the range that belongs to it, whose clips may be NaN or infinite as well.
        """
        if values.numel() == 0 or transforming():
            return
        smallest, largest = torch.aminmax(values)
        spread = largest.float() - smallest.float()
        if width is not None:
            spread = spread.add_(width)
        # Of infinity and NaN that is NaN, else 0. (0 times it would be as well; torch.compile takes that for 0 always.)
        self.poison.add_(spread - spread)

    def _move_extra(self, move: Callable[[Tensor], Tensor]) -> None:
        self.poison = move(self.poison)
        self.degenerate = None if self.degenerate is None else move(self.degenerate)
        self.below_zero = None if self.below_zero is None else move(self.below_zero)


class CalibratingQuantizer(FlaggedQuantizer):
    """A quantizer that observes training batches until it has seen enough of them for a range.

    Attributes:
        calibrating: Whether batches are still to be observed.
        recalibrating: Whether it calibrates although it has clips from before, with which it is evaluated meanwhile.
        fresh: Whether a calibration has ended since the processes agreed on the clips.
        observed: The batches.
        missed: Whether it has been given up that a training batch reaches it: it has no range, is evaluated in float
            and not in the record. It calibrates as soon as one does, and is in use when the processes have agreed.
        is_told: Whether somebody was told that it is missed.
        waits: Whether batches without values (see :func:`~amct_lightning.quantizers.ifmr.has_values`) are not counted,
            which the host then waits to hear.
        start: What range a calibration finds: ``"mse"``, ``"output"`` or ``"percentile"``, and the percentile for that.
        readers: What finds the layers by whose outputs it goes, for ``"output"``.
    """

    num_bits: int
    fixed_min: bool
    batch_num: int
    calls: int
    clip: tuple[float, float] | None
    waits: bool
    symmetric: bool
    start: tuple[str, float] = ("mse", PERCENTILE)
    readers: Sequence[Callable[[], Sequence[Reader]]] = ()
    observed: list[Tensor]
    calibrated_batches: Tensor
    missed: bool = False
    is_told: bool = False
    _is_reached: bool = False
    _batch_of_gate: int
    _begun: int
    _calls_now: int

    @property
    def batches(self) -> int:
        """How far the calibration is, in batches observed; ``calibrated_batches`` keeps it in the state.

        From 0 to ``batch_num``, where it is complete and all processes have the same range; one more before they have
        agreed on it, which is not kept. A calibration that goes over an old one counts from ``-batch_num`` to 0.
        """
        return self._batches

    @batches.setter
    def batches(self, batches: int) -> None:
        with torch.no_grad():
            self.calibrated_batches.fill_(min(batches, self.batch_num))
        self._note(batches)

    def _note(self, batches: int) -> None:
        self._batches = batches
        # Written down, because torch.compile compiles a forward anew whenever a number that it reads has changed.
        self.calibrating = batches < self.batch_num
        self.recalibrating = batches < 0
        self.fresh = batches > self.batch_num

    @property
    def settled(self) -> bool:
        """Whether the calibration is complete and the processes have agreed on the clips; the same on all of them."""
        return not (self.calibrating or self.fresh)

    def settle(self) -> None:
        """Take note that all processes have the same clips, if the calibration is complete."""
        if self.fresh:
            self._note(self.batch_num)
            self.missed = False

    @property
    def reached(self) -> bool:
        """Whether an input of a training batch has come since the calibration began, in this process."""
        return self._is_reached or bool(self.observed) or not self.calibrating

    def give_up(self) -> None:
        """Wait no longer for a calibration: no training batch reaches it, on any process. An old range stays in use."""
        if self.recalibrating:
            self.batches = self.batch_num
        else:
            self.missed, self.is_told = True, False

    def catch_up(self) -> None:
        """Take note of a calibration that was copied into the buffers, as averages of weights copy those of a model."""
        if not self.calibrated_batches.is_meta:
            self._note(min(int(self.calibrated_batches), self.batch_num))
            self.missed = self.missed and self.calibrating

    @property
    def has_range(self) -> bool:
        """Whether there are clips to evaluate with: given, or from a calibration; the same on all processes if late."""
        return not self.missed and (self.recalibrating or not self.calibrating)

    def recalibrate(self) -> None:
        """Calibrate anew, on the training batches to come; a range that the configuration gives stays."""
        if self.clip is None and self.has_range:
            self.batches = -self.batch_num
            self.observed = []
            self._is_reached = False

    def finish_calibration(self, clip_max: Tensor, clip_min: Tensor, degenerate: Tensor | None = None) -> None:
        """Take over a calibrated range and stop observing."""
        raise TypeError(f"{type(self).__name__} is not a complete quantizer: it defines no finish_calibration().")

    def _counts(self, values: Tensor) -> bool:
        return not self.waits or has_values(values, self.num_bits)

    def end_batch(self) -> None:
        """End a calibration whose last batch is over, though it has made fewer calls than expected."""
        if self.gate is not None and self._batch_of_gate == self.gate.batch and self._begun >= self.batch_num:
            self._end_calibration()

    def _count(self) -> None:
        """Count the batch that was observed, of which further calls may follow; end the calibration with the last."""
        before = self.batch_num if self.recalibrating else 0
        if self.gate is None or self.gate.is_over:  # nobody tells where a batch ends
            self._begun, missing = divmod(len(self.observed), self.calls)
        else:
            if self._batch_of_gate != self.gate.batch:
                self._batch_of_gate, self._begun, self._calls_now = self.gate.batch, self.batches + before + 1, 0
            self._calls_now += 1
            missing = max(0, self.calls - self._calls_now)
        if self._begun < self.batch_num:
            self.batches = self._begun - before
        elif not missing:
            self._end_calibration()

    def _end_calibration(self) -> None:
        if self.calibrating:
            found = self._found_range()
            if self.fixed_min:
                lowest = torch.stack([batch.amin() for batch in self.observed if batch.numel()])
                self.below_zero = (lowest.amin() < 0).float()
            self.finish_calibration(*found)

    def _found_range(self) -> tuple[Tensor, Tensor, Tensor]:
        init, share = self.start
        if init == "percentile":
            return percentile_range(self.observed, self.num_bits, share, self.fixed_min, self.symmetric)
        result = ifmr(self.observed, self.num_bits)
        upper, lower = result.clip_max, result.clip_min
        readers = [reader for find in self.readers for reader in find()]
        if init == "output" and readers:
            first = upper, torch.zeros_like(lower) if self.fixed_min else lower
            upper, lower = output_range(self.observed, readers, first, self.num_bits, self.fixed_min, self.symmetric)
        return upper, lower, result.degenerate

    def _move_extra(self, move: Callable[[Tensor], Tensor]) -> None:
        super()._move_extra(move)
        self.observed = [move(batch) for batch in self.observed]
