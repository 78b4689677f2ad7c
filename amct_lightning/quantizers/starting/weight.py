"""The weight quantizers whose scales start from the least squared error (``init: mse``)."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_lightning.quantizers.base import is_exporting
from amct_lightning.quantizers.functional import usable_scale
from amct_lightning.quantizers.functions.weight import ChannelLayout
from amct_lightning.quantizers.starting.weight_ratio import least_error_ratio
from amct_lightning.quantizers.transforms import transforming
from amct_lightning.quantizers.weight import LearnedWeightQuantizer, WeightQuantizer


class RatioWeightQuantizer(WeightQuantizer):
    """Fake-quantize a weight with scales ``ratio * max-abs``, recomputed in every forward (``init: mse``).

    The ratios are those with the least squared error for the weight at the first training forward, one for each scale;
    they are part of the state and stay. Before that forward they are those of the weight as it is.

    Args:
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.
        layout: Where the output channels of the weight are.
        weight: The weight, for the shapes.

    Attributes:
        ratio: The ratios, 1-d float32.
        starting: Whether they are still to be found.

    Example:
        >>> weight = torch.tensor([[1.0] + [0.26] * 30])
        >>> quantizer = RatioWeightQuantizer(4, True, ChannelLayout(), weight)
        >>> quantizer(weight)[0, :2], quantizer.ratio
        (tensor([0.9400, 0.2686]), tensor([0.9400]))
    """

    ratio: Tensor
    initialized: Tensor
    searches = True
    is_max_abs = False

    def __init__(self, num_bits: int, channel_wise: bool, layout: ChannelLayout, weight: Tensor) -> None:
        super().__init__(num_bits, channel_wise, layout, weight)
        self.starting = True
        self.register_buffer("ratio", torch.ones_like(self.scale))
        self.register_buffer("initialized", torch.tensor(0, device=weight.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget scales and ratios; the next forward sets them."""
        super().reset_parameters()
        self.ratio.fill_(1.0)
        self.initialized.fill_(0)
        self.starting = True

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Keep the scales that belong to ``weight`` as it is now; find the ratios if that is still to be done.

        Args:
            weight: The weight of the layer.
        """
        if self.starting:
            self.begin(weight)
        super().freeze(weight)

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Find the ratios for ``weight``, and keep them.

        Args:
            weight: The weight of the layer.
        """
        self.ratio.copy_(self._present_ratio(weight))
        self.initialized.fill_(1)
        self.starting = False

    def _present_ratio(self, weight: Tensor) -> Tensor:
        settings = self.layout, self.num_bits, self.channel_wise
        return least_error_ratio(weight, *settings) if self.starting else self.ratio

    @torch.no_grad()
    def own_scale(self, weight: Tensor) -> Tensor:
        """Return the scales that belong to ``weight``, 1-d float32."""
        return usable_scale(self.max_abs_scale(weight) * self._present_ratio(weight))

    def scale_sources(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that the scales depend on besides the weight."""
        return *super().scale_sources(), None if self.starting else self.ratio

    def present_scale(self, weight: Tensor) -> Tensor:
        """Return the scale for a forward, shaped to broadcast over ``layout.view(weight)``, and keep the books.

        Args:
            weight: The weight of the layer, float32.
        """
        scale = self.scale
        if not self.frozen:
            books = not (transforming() or is_exporting())
            if self.starting and books and self.learns:
                self._start(weight)
            scale = self.own_scale(weight)
            if books:
                with torch.no_grad():
                    self.scale.copy_(scale)
        return self.layout.spread(scale, self.layout.view(weight), self.channel_wise)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, weight: Tensor) -> None:
        self.begin(weight)

    def _after_load(self) -> None:
        super()._after_load()
        self.starting = not bool(self.initialized)


class SearchedLearnedWeightQuantizer(LearnedWeightQuantizer):
    """Fake-quantize a weight with learned scales that begin with the least squared error for the weight.

    Args: see :class:`LearnedWeightQuantizer`.

    Example:
        >>> weight = torch.tensor([[1.0] + [0.26] * 30])
        >>> quantizer = SearchedLearnedWeightQuantizer(4, True, ChannelLayout(), weight, elements=31)
        >>> quantizer(weight)[0, :2].detach()
        tensor([0.9400, 0.2686])
    """

    searches = True

    @torch.no_grad()
    def own_scale(self, weight: Tensor) -> Tensor:
        """Return the scales from which they are learned if ``weight`` is the first one, 1-d float32."""
        ratio = least_error_ratio(weight, self.layout, self.num_bits, self.channel_wise)
        return usable_scale(self.max_abs_scale(weight) * ratio)
