"""The weight quantizers: max-abs scales (ARQ), recomputed in every forward, and learned scales (ULQ)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor, nn

from amct_lightning.quantizers.base import Quantizer, is_exporting
from amct_lightning.quantizers.functions.weight import (
    ChannelLayout,
    arq_scale,
    fake_quantize_weight,
    fake_quantize_weight_learned,
    scale_gradient_factor,
)
from amct_lightning.quantizers.operators import takes_operators, weight_operator
from amct_lightning.quantizers.transforms import transforming


class WeightQuantizer(Quantizer):
    """Fake-quantize a weight with a max-abs scale per output channel or one for the whole tensor.

    Args:
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.
        layout: Where the output channels of the weight are.
        weight: The weight, for the first value of the scales.

    Attributes:
        scale: Scales of the last forward, 1-d float32: one per output channel, or a single one.
        offset: Their offsets, always 0, 1-d float32.
        frozen: Whether the scales are kept, whatever becomes of the weight.
        starting: Whether the first training forward, which sets what is kept from then on, is still to come.
        searches: Whether a search finds what is set then (``init: mse``).
        is_max_abs: Whether the scales of a forward are the max-abs ones, unless some are given.

    Example:
        >>> weight = torch.tensor([[1.27, 0.014], [0.127, 0.02]])
        >>> quantizer = WeightQuantizer(8, channel_wise=True, layout=ChannelLayout(), weight=weight)
        >>> quantizer(weight)
        tensor([[1.2700, 0.0100],
                [0.1270, 0.0200]])
        >>> quantizer.scale
        tensor([0.0100, 0.0010])
    """

    scale: Tensor
    offset: Tensor
    scale_frozen: Tensor
    starting: bool = False
    searches: ClassVar[bool] = False
    is_max_abs: ClassVar[bool] = True

    def __init__(self, num_bits: int, channel_wise: bool, layout: ChannelLayout, weight: Tensor) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.channel_wise = channel_wise
        self.layout = layout
        self.frozen = False
        scale = self.max_abs_scale(weight)
        self._make_scale(scale)
        self.register_buffer("offset", torch.zeros_like(scale))

    def _make_scale(self, scale: Tensor) -> None:
        self.register_buffer("scale", scale)
        # Part of the state, because a frozen scale cannot be had from the weight again. 0 or 1 and no bool, which
        # averages of weights (WeightAveraging) cannot subtract.
        self.register_buffer("scale_frozen", torch.tensor(0, device=scale.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget the scales; the next forward sets them."""
        self.scale.fill_(1.0)
        self.offset.zero_()
        self.scale_frozen.fill_(0)
        self.frozen = False

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Keep the scales that belong to ``weight`` as it is now; those that are kept already stay.

        Args:
            weight: The weight of the layer.
        """
        if not self.frozen:
            self.refresh(weight)
            self.scale_frozen.fill_(1)
            self.frozen = True

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Set the scales to those of ``weight`` as it is now, also if they are kept.

        Args:
            weight: The weight of the layer.
        """
        self.scale.copy_(self.own_scale(weight))

    def begin(self, weight: Tensor) -> None:
        """Set what is kept from the first training forward on: of max-abs scales, nothing."""

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Compute the scales in every forward again."""
        if self.frozen:
            self.scale_frozen.fill_(0)
            self.frozen = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in its own shape and dtype.

        Args:
            weight: The weight of the layer; the factors are computed in float32 whatever its dtype.

        Returns:
            The fake-quantized weight.
        """
        if takes_operators():
            given = self.given_scale()
            if given is None and self.searches:
                given = self.own_scale(weight)
            return weight_operator(weight, given, self.layout, self.num_bits, self.channel_wise)
        return self._quantize(weight.float()).to(weight.dtype)

    def given_scale(self) -> Tensor | None:
        """Return the scales if they are not to be computed from the weight."""
        return self.scale if self.frozen else None

    def scale_sources(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that the scales depend on besides the weight."""
        return (self.given_scale(),)

    @property
    def settings(self) -> Hashable:
        """What else than tensors the quantized weight depends on."""
        return type(self), self.num_bits, self.channel_wise, self.layout

    def _quantize(self, weight: Tensor) -> Tensor:
        return fake_quantize_weight(weight, self.present_scale(weight), self.layout, self.num_bits)

    def present_scale(self, weight: Tensor) -> Tensor:
        """Return the scale for a forward, shaped to broadcast over ``layout.view(weight)``, and keep the books.

        Args:
            weight: The weight of the layer, float32.
        """
        if self.frozen:
            return self.layout.spread(self.scale, self.layout.view(weight), self.channel_wise)
        with torch.no_grad():
            scale = arq_scale(weight, self.layout, self.num_bits, self.channel_wise)
            if not (transforming() or is_exporting()):
                self.scale.copy_(scale.flatten())
        return scale

    @torch.no_grad()
    def compute_scale(self, weight: Tensor) -> Tensor:
        """Return the scales that belong to ``weight`` as it is now, or those that are kept; 1-d float32."""
        return self.scale.clone() if self.frozen else self.own_scale(weight)

    def own_scale(self, weight: Tensor) -> Tensor:
        """Return the scales that belong to ``weight``, 1-d float32."""
        return self.max_abs_scale(weight)

    def max_abs_scale(self, weight: Tensor) -> Tensor:
        """Return the max-abs scales of ``weight``, 1-d float32."""
        return arq_scale(weight.detach().float(), self.layout, self.num_bits, self.channel_wise).flatten()

    def _after_load(self) -> None:
        self.frozen = bool(self.scale_frozen)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        groups = f", group_size={self.layout.group_size}" if self.layout.group_size else ""
        return f"num_bits={self.num_bits}, channel_wise={self.channel_wise}{groups}"


class LearnedWeightQuantizer(WeightQuantizer):
    """Fake-quantize a weight with scales that are learned (``ulq_retrain``).

    The first training forward sets them to the max-abs scales of the weight; from then on they are trained.

    Args:
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.
        layout: Where the output channels of the weight are.
        weight: The weight, for the first value of the scales.
        elements: Number of weight elements by which the gradient of a scale is normalized.

    Attributes:
        scale: Learned scales, 1-d float32 parameter: one per output channel, or a single one.
        offset: Their offsets, always 0, 1-d float32.
        degenerate: How many scales began with 1, as their weights were too small, 0-d float32; ``None`` if nobody needs
            to look.

    Example:
        >>> weight = torch.tensor([[1.27, 0.014]])
        >>> quantizer = LearnedWeightQuantizer(8, True, ChannelLayout(), weight, elements=2)
        >>> quantizer(weight).sum().backward()
        >>> quantizer.scale.grad is not None
        True
    """

    initialized: Tensor
    is_max_abs = False

    def __init__(self, num_bits: int, channel_wise: bool, layout: ChannelLayout, weight: Tensor, elements: int) -> None:
        super().__init__(num_bits, channel_wise, layout, weight)
        self.gradient_factor = scale_gradient_factor(elements, num_bits)
        self.starting = True
        self.degenerate: Tensor | None = None
        self.register_buffer("initialized", torch.tensor(0, device=weight.device))

    def _make_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget the learned scales; the next forward starts from those of the weight."""
        self.scale.fill_(1.0)
        self.offset.zero_()
        self.initialized.fill_(0)
        self.starting = True

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Start from the scales of ``weight`` if training has not begun; an optimizer is kept off elsewhere.

        Args:
            weight: The weight of the layer.
        """
        if self.starting:
            self.begin(weight)

    def refresh(self, weight: Tensor) -> None:
        """Do nothing: learned scales do not follow the weight."""

    def unfreeze(self) -> None:
        """Do nothing: what is learned again is the optimizer's business."""

    def given_scale(self) -> Tensor | None:
        """Return the scales if they are not to be computed from the weight."""
        return None if self.starting else self.scale

    def _quantize(self, weight: Tensor) -> Tensor:
        scale = self.present_scale(weight)
        return fake_quantize_weight_learned(weight, scale, self.layout, self.num_bits, self.gradient_factor)

    def present_scale(self, weight: Tensor) -> Tensor:
        """Return the learned scale for a forward, which begins with that of the weight.

        Args:
            weight: The weight of the layer, float32.
        """
        scales = self.scale
        if self.starting and (transforming() or is_exporting()):
            scales = self.own_scale(weight)
        elif self.starting:
            self._start(weight)
        return self.layout.spread(scales, self.layout.view(weight), self.channel_wise)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        if self.learns:
            self.begin(weight)
        else:
            self.scale.copy_(self.own_scale(weight))

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Set the scales to those of ``weight``, from where they are learned.

        Args:
            weight: The weight of the layer.
        """
        self.scale.copy_(self.own_scale(weight))
        view = self.layout.view(weight.detach().float().abs())
        largest = view.amax(self.layout.reduced_dims(view, self.channel_wise)).flatten()
        self.degenerate = (largest < self.scale).sum().float()  # a scale of their own is smaller than the weights
        self.initialized.fill_(1)
        self.starting = False

    @torch.no_grad()
    def compute_scale(self, weight: Tensor) -> Tensor:
        """Return the learned scales, before training those of ``weight``; 1-d float32."""
        return self.own_scale(weight) if self.starting else self.scale.detach().clone()

    def _after_load(self) -> None:
        self.starting = not bool(self.initialized)
