"""The activation quantizer: learned clips (ULQ) on top of one calibration (IFMR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.quantizers.base import in_backward, several_processes
from amct_lightning.quantizers.calibrating import CalibratingQuantizer
from amct_lightning.quantizers.functional import activation_scale_offset, range_around_zero, repair_clips
from amct_lightning.quantizers.functions.activation import clips_around_zero, fake_quantize_activation
from amct_lightning.quantizers.operators import activation_operator, takes_operators
from amct_lightning.quantizers.transforms import transforming_calibrated


class ActivationQuantizer(CalibratingQuantizer):
    """Fake-quantize a tensor into a range whose two ends are learned.

    Until it has seen ``batch_num`` training batches it calibrates: it quantizes with the range of the current
    batch and, with the last one, searches the range with the smallest error. On the way the clips hold the range of
    the batch, as in AMCT: that is what weight decay and the momentum of an optimizer see. With several processes, which
    must not differ, they keep their first values until the end. Layers that read the same tensor
    share one quantizer; only the first of them passes ``observe=True``.

    The factors stay float32 whatever :meth:`torch.nn.Module.to` asks for.

    Args:
        num_bits: 4, 8 or 16.
        fixed_min: Fix the lower clip to 0, for inputs that are never negative.
        clip: Upper and lower clip to start from; ``None`` calibrates them.
        batch_num: Number of training batches to calibrate on.
        calls: Number of times that it is called in each of them.
        symmetric: Keep the range around 0, so that the offset is 0; its width is that between the clips.

    Attributes:
        clip_max: Learned upper clip, 0-d float32 parameter.
        clip_min: Learned lower clip, 0-d float32 parameter.
        frozen: Whether training leaves the stored clips alone.
        table: A ``FactorTable``, where the clips of all quantizers of a model are made usable together; ``None`` if
            each does it for itself.
        serving: Dtype in which a server has the scale and its reciprocal, see :func:`amct_lightning.prepare_qat`; then
            the scale is one of its numbers. ``None`` for a scale of float32.
        uses: Number of times that a forward of the model uses it: layers may share it, or be called several times.

    Example:
        >>> quantizer = ActivationQuantizer(num_bits=8, clip=(2.55, -1e-9), fixed_min=True)
        >>> quantizer(torch.tensor([0.014, -1.0, 9.0])).detach()
        tensor([0.0100, 0.0000, 2.5500])
    """

    clip_max_previous: Tensor
    clip_min_previous: Tensor
    serving: torch.dtype | None = None

    def __init__(
        self,
        num_bits: int = 8,
        fixed_min: bool = False,
        clip: tuple[float, float] | None = None,
        batch_num: int = 1,
        calls: int = 1,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.num_bits = num_bits
        self.fixed_min = fixed_min
        self.batch_num = batch_num
        self.calls = calls
        self.clip = clip
        self.waits = False
        self.table: Any = None
        self.uses = 1
        self.clip_max = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.clip_min = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.register_buffer("clip_max_previous", torch.zeros((), dtype=torch.float32))
        self.register_buffer("clip_min_previous", torch.zeros((), dtype=torch.float32))
        self.register_buffer("calibrated_batches", torch.tensor(0))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set clips and calibration to what they are before training."""
        upper, lower = self.clip or (1.0, -1.0)
        self._store(torch.tensor(upper), torch.tensor(lower))
        self.batches = self.batch_num if self.clip else 0
        self.frozen = False
        self.observed = []
        self.missed = self._is_reached = False
        self._batch_of_gate, self._begun, self._calls_now = -1, 0, 0
        self.reset_flags(self.clip_max.device)

    @property
    def moves(self) -> bool:
        """Whether a forward now repairs the clips and keeps them."""
        return self.learns and not (self.frozen or self.calibrating)

    @property
    def scale(self) -> Tensor:
        """The scale of the present clips, 0-d float32."""
        return self._factors()[0]

    @property
    def offset(self) -> Tensor:
        """The offset (zero point) of the present clips, an integer in a 0-d float32 tensor."""
        return self._factors()[1]

    def forward(self, x: Tensor, observe: bool = True) -> Tensor:
        """Return the fake-quantized ``x`` in its own shape and dtype; in training mode also keep the books.

        Args:
            x: Activations of any shape and floating dtype.
            observe: Whether a calibrating quantizer counts ``x`` as a batch.

        Returns:
            The fake-quantized activations.
        """
        return self.quantize(x, *self.update_range(x, observe))

    def update_range(self, x: Tensor, observe: bool = True, preview: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the clips to quantize ``x`` with; in training mode first calibrate on it or repair the clips.

        Args:
            x: Activations of any shape and floating dtype.
            observe: Whether a calibrating quantizer counts ``x`` as a batch.
            preview: The part of ``x`` whose range is used until the last calibration batch; ``None`` for all of it.

        Returns:
            The upper and the lower clip, 0-d float32.
        """
        if takes_operators():
            return self._stored()  # which the operator repairs
        if not self.learns or transforming_calibrated(not self.calibrating):
            return self.usable_clips()
        if self.calibrating:
            upper, lower = self._observe(x.float(), observe, (x if preview is None else preview).float())
        else:
            upper, lower = self._usable()
            if not self.frozen:
                self._store(upper, lower)
            upper, lower = self._in_use(upper, lower)
        with torch.no_grad():
            self.watch(x, upper - lower)
        return upper, lower

    def quantize(self, x: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        """Return ``x`` fake-quantized into a range that :meth:`update_range` gave, in its own shape and dtype.

        Args:
            x: Activations of any shape and floating dtype.
            upper: Upper clip, 0-d float32.
            lower: Lower clip, 0-d float32.

        Returns:
            The fake-quantized activations.
        """
        if takes_operators():
            previous = self.clip_max_previous, self.clip_min_previous
            return activation_operator(x, (upper, lower, *previous), self.num_bits, self.fixed_min, self.symmetric)
        return fake_quantize_activation(x, *self.learned_clips, upper, lower, self.num_bits, torch.float32)

    @torch.no_grad()
    def finish_calibration(self, clip_max: Tensor, clip_min: Tensor, degenerate: Tensor | None = None) -> None:
        """Take over a calibrated range and stop observing.

        Args:
            clip_max: Upper clip, 0-d.
            clip_min: Lower clip, 0-d.
            degenerate: The flag of that name, 0-d float32.
        """
        self.degenerate = degenerate
        self._store(*repair_clips(clip_max, clip_min, clip_max, clip_min, self.fixed_min))
        self.batches = self.batch_num + 1
        self.observed = []

    def repair(self) -> None:
        """Take over the clips that are usable, and keep them for later repairs, as every training forward does."""
        self._store(*self._usable())

    @torch.no_grad()
    def keep(self, upper: Tensor, lower: Tensor, watched: Tensor | None = None) -> None:
        """Take over what was made of the clips, as every training forward does.

        Args:
            upper: The upper clip in use, 0-d float32.
            lower: The lower clip in use.
            watched: A number that is NaN or infinite if a value of the input or a clip was; ``None`` if nobody has
                looked.
        """
        self._store(upper, lower)
        if watched is not None:
            self.poison.add_(watched, alpha=0)  # 0 times a number, as in watch()

    @torch.no_grad()
    def freeze(self, frozen: bool = True) -> None:
        """Let training leave the clips alone, or learn them again; a calibration goes on in any case.

        Args:
            frozen: Whether to leave them alone.
        """
        if frozen != self.frozen:
            self.repair()
        self.frozen = frozen

    @torch.no_grad()
    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.factors_of(*self.usable_clips())

    def factors_of(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the offset that it has with a range, 0-d float32.

        Args:
            upper: Upper clip, 0-d float32.
            lower: Lower clip.

        Example:
            >>> quantizer = ActivationQuantizer()
            >>> quantizer.serving = torch.bfloat16
            >>> quantizer.factors_of(torch.tensor(2.55), torch.tensor(0.0))
            (tensor(0.0100), tensor(-128.))
        """
        scale, offset = activation_scale_offset(upper, lower, self.num_bits, self.serving)
        around_zero = self.symmetric and self.serving is not None  # whatever the scale was rounded to
        return scale, torch.zeros_like(offset) if around_zero else offset

    @torch.no_grad()
    def usable_clips(self) -> tuple[Tensor, Tensor]:
        """Return the upper and lower clip that the quantizer works with at present, without touching it.

        While frozen it works with the copies that it keeps, and whatever is written into the parameters does not count.

        Example:
            >>> ActivationQuantizer(fixed_min=True, clip=(2.5, -1.0)).usable_clips()[1]
            tensor(0.)
        """
        return self._in_use(*self._usable())

    @property
    def learned_clips(self) -> tuple[Tensor, Tensor]:
        """What the gradients of the upper and the lower clip in use go to."""
        clips = self.clip_max, self.clip_min
        return clips_around_zero(*clips, self.num_bits) if self.symmetric else clips

    @torch.no_grad()
    def _in_use(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        return range_around_zero(upper, lower, self.num_bits) if self.symmetric else (upper, lower)

    @property
    def clips(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that the usable clips are made of: upper and lower clip, and their previous values."""
        return self.clip_max, self.clip_min, self.clip_max_previous, self.clip_min_previous

    def _stored(self) -> tuple[Tensor, Tensor]:
        return (self.clip_max_previous, self.clip_min_previous) if self.frozen else (self.clip_max, self.clip_min)

    @torch.no_grad()
    def _usable(self) -> tuple[Tensor, Tensor]:
        return self._stored() if self.frozen else self._repaired()

    def _repaired(self) -> tuple[Tensor, Tensor]:
        return repair_clips(*self.clips, self.fixed_min)

    @torch.no_grad()
    def _store(self, upper: Tensor, lower: Tensor) -> None:
        # One launch for the four; a foreach operator is native on every device that the package is for.
        torch._foreach_copy_(
            list(self.clips),
            [upper, lower, upper, lower],
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _observe(self, values: Tensor, observe: bool, preview: Tensor) -> tuple[Tensor, Tensor]:
        kept, whole = None, preview is values
        observe = observe or self.missed  # the layer that should feed it is the one that no batch reaches
        if observe and values.numel() and not in_backward():
            self._is_reached = True
            if self._counts(values):
                self.observed.append(values.detach())
                self._count()  # which is over with the last batch, of which nobody needs a copy
                if self.calibrating:
                    # The model may rewrite its activations in place, and a single NaN, which the flag tells of, would
                    # make the range NaN for good.
                    kept = self.observed[-1] = values.detach().nan_to_num(0.0, 0.0, 0.0)
        if not self.calibrating or values.numel() == 0:
            return self.usable_clips()
        if kept is None or not whole:
            kept = preview.detach().nan_to_num(0.0, 0.0, 0.0)
        lower, upper = torch.aminmax(kept)
        if self.symmetric:
            upper = torch.maximum(upper, -lower)
            lower = -upper
        upper, lower = repair_clips(upper, lower, upper, lower, self.fixed_min)
        if observe and not (self.recalibrating or in_backward() or several_processes()):
            self._store(upper, lower)
        return self._in_use(upper, lower)

    def _after_load(self) -> None:
        self.catch_up()
        if self.frozen:
            with torch.no_grad():
                self._store(*self._repaired())
        self.observed = []
        self.reset_flags(self.clip_max.device)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        state = "calibrating" if self.calibrating else "calibrated"
        kind = "symmetric" if self.symmetric else f"fixed_min={self.fixed_min}"
        return f"num_bits={self.num_bits}, {kind}, {state}"
