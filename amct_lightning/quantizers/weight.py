"""The weight quantizer: max-abs scales (ARQ), recomputed from the weight in every forward."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.functional import ChannelLayout, arq_scale, fake_quantize_weight


class WeightQuantizer(Quantizer):
    """Fake-quantize a weight with a scale per output channel or one for the whole tensor.

    Args:
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.
        layout: Where the output channels of the weight are.
        weight: The weight, for the first value of the scales.

    Attributes:
        scale: Scales of the last forward, 1-d float32: one per output channel, or a single one.
        offset: Their offsets, always 0, 1-d float32.

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

    def __init__(self, num_bits: int, channel_wise: bool, layout: ChannelLayout, weight: Tensor) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.channel_wise = channel_wise
        self.layout = layout
        self.register_buffer("scale", self.compute_scale(weight))
        self.register_buffer("offset", torch.zeros_like(self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in its own shape and dtype.

        Args:
            weight: The weight of the layer; the factors are computed in float32 whatever its dtype.

        Returns:
            The fake-quantized weight.
        """
        values = weight if weight.dtype == torch.float32 else weight.float()
        with torch.no_grad():
            scale = arq_scale(values, self.layout, self.num_bits, self.channel_wise)
            self.scale.copy_(scale.flatten())
        y = fake_quantize_weight(values, scale, self.layout, self.num_bits)
        return y if weight.dtype == torch.float32 else y.to(weight.dtype)

    @torch.no_grad()
    def compute_scale(self, weight: Tensor) -> Tensor:
        """Return the scales of ``weight`` as it is now, 1-d float32."""
        return arq_scale(weight.float(), self.layout, self.num_bits, self.channel_wise).flatten()

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"num_bits={self.num_bits}, channel_wise={self.channel_wise}"
