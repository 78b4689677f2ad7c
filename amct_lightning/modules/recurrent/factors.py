"""What a quantized product of a recurrent layer is made from, so that its parts can be rebuilt in backward.

Autograd then keeps what the float layer keeps (input and weight) and single numbers; the quantized ones are gone after
the forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amct_lightning.quantizers import ActivationQuantizer, ChannelLayout, LearnedWeightQuantizer, WeightQuantizer
from amct_lightning.quantizers.functional import activation_scale_offset, dequantize_, quantize, range_ends
from amct_lightning.quantizers.functions.weight import fake_quantize_weight, gradient_of_scale
from amct_lightning.quantizers.kept import evaluates, kept_weight


class ActivationFactors(NamedTuple):
    """How an activation is quantized in a forward.

    Attributes:
        upper: Upper clip.
        lower: Lower clip.
        scale: Scale that belongs to them.
        offset: Offset.
    """

    upper: Tensor
    lower: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, quantizer: ActivationQuantizer, upper: Tensor, lower: Tensor) -> ActivationFactors:
        """Return the factors of a range that ``quantizer.update_range`` gave.

        Args:
            quantizer: The quantizer.
            upper: Upper clip.
            lower: Lower clip.

        Example:
            >>> quantizer = ActivationQuantizer(num_bits=8, clip=(2.55, -1e-9), fixed_min=True)
            >>> factors = ActivationFactors.of(quantizer, *quantizer.usable_clips())
            >>> factors.quantized(torch.tensor([0.014, 9.0]), num_bits=8)
            tensor([0.0100, 2.5500])
        """
        with torch.no_grad():
            return cls(upper, lower, *activation_scale_offset(upper, lower, quantizer.num_bits))

    def quantized(self, x: Tensor, num_bits: int) -> Tensor:
        """Return fake-quantized activations, in their own dtype; the arithmetic is in float32.

        Args:
            x: Activations.
            num_bits: Number of bits.
        """
        codes = quantize(x.float(), self.scale, num_bits, self.offset)
        return dequantize_(codes, self.scale, self.offset).to(x.dtype)

    def beyond(self, x: Tensor, num_bits: int) -> Tensor:
        """Tell which activations are outside of what the integers express, where no gradient passes.

        Args:
            x: Activations.
            num_bits: Number of bits.
        """
        x = x.float()
        largest, smallest = range_ends(self.scale, num_bits, self.offset)
        return (x > largest) | (x < smallest)


class WeightSettings(NamedTuple):
    """What does not change from step to step in the quantization of a weight.

    Attributes:
        layout: Where the output channels are.
        num_bits: Number of bits.
        factor: What normalizes the gradient of learned scales; ``None`` if they are not learned.
    """

    layout: ChannelLayout
    num_bits: int
    factor: float | None


class WeightFactors(NamedTuple):
    """A weight and how it is quantized in a forward.

    Attributes:
        weight: The weight.
        scale: Its scale, shaped to broadcast over ``settings.layout.view(weight)``; the parameter if it is learned.
        quantized: The fake-quantized weight, without a gradient.
        settings: The rest.
    """

    weight: Tensor
    scale: Tensor
    quantized: Tensor
    settings: WeightSettings

    @classmethod
    def of(cls, quantizer: WeightQuantizer, weight: Tensor) -> WeightFactors:
        """Return the factors of a weight after a forward of its quantizer, which keeps its books and calls its hooks.

        Args:
            quantizer: The quantizer of the weight.
            weight: The weight.
        """
        hooked = quantizer._forward_hooks or quantizer._forward_pre_hooks
        shares = not (hooked or torch.is_grad_enabled()) and evaluates(quantizer)
        with torch.no_grad():
            quantized = kept_weight(quantizer, weight, (), lambda: quantizer(weight)) if shares else quantizer(weight)
        learned = isinstance(quantizer, LearnedWeightQuantizer)
        # The next forward writes into the scales that are not learned; backward needs those of this one.
        scale = quantizer.scale if learned else quantizer.scale.clone()
        layout = quantizer.layout
        scale = layout.spread(scale, layout.view(weight), quantizer.channel_wise)
        factor = quantizer.gradient_factor if isinstance(quantizer, LearnedWeightQuantizer) else None
        return cls(weight, scale, quantized, WeightSettings(layout, quantizer.num_bits, factor))


def rebuilt_weight(weight: Tensor, scale: Tensor, settings: WeightSettings) -> Tensor:
    """Return the fake-quantized weight once more, in its own dtype.

    Args:
        weight: The weight.
        scale: Its scale.
        settings: How it is quantized.
    """
    return fake_quantize_weight(weight.float(), scale, settings.layout, settings.num_bits).to(weight.dtype)


def weight_gradients(
    weight: Tensor, scale: Tensor, settings: WeightSettings, grad: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a weight and its scale from that of the fake-quantized weight.

    Args:
        weight: The weight.
        scale: Its scale.
        settings: How it is quantized.
        grad: The gradient.
        learns: Whether the gradient of the scale is wanted.
    """
    if not learns:
        return grad.to(weight.dtype), None
    saved, grad = (weight.float(), scale), grad.float()
    return grad.to(weight.dtype), gradient_of_scale(saved, (settings.layout, settings.num_bits, settings.factor), grad)
