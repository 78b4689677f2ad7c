"""The quantizers of activations that have no range: there is nothing to calibrate, to learn or to record."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.functional import quantize_tokens
from amct_lightning.quantizers.functions.activation import fake_quantize_tokens
from amct_lightning.quantizers.operators import takes_operators


class RangelessQuantizer(Quantizer):
    """What a layer has in place of an activation quantizer with a range. It has no state.

    Attributes:
        learned_clips: What the gradients of clips go to: nothing.
        why_no_integers: Why the layer's products cannot be computed in integers, a clause.
    """

    learned_clips: ClassVar[tuple[None, None]] = (None, None)
    why_no_integers: ClassVar[str] = ""

    def forward(self, x: Tensor, observe: bool = True) -> Tensor:
        """Return the activations that the layer computes with, in shape and dtype of ``x``.

        Args:
            x: Activations, tokens along the last axis.
            observe: Without a meaning here.
        """
        raise TypeError(f"{type(self).__name__} is not a complete quantizer: it defines no forward().")

    def quantized(self, x: Tensor) -> Tensor:
        """Return the same as :meth:`forward`, without a graph.

        Args:
            x: Activations, tokens along the last axis.
        """
        raise TypeError(f"{type(self).__name__} is not a complete quantizer: it defines no quantized().")


class TokenQuantizer(RangelessQuantizer):
    """Fake-quantize each token with the scale that its largest magnitude asks for, anew in every forward.

    Args:
        num_bits: 4, 8 or 16.

    Example:
        >>> import torch
        >>> TokenQuantizer(8)(torch.tensor([[1.27, 0.014], [0.0, 0.0]]))
        tensor([[1.2700, 0.0100],
                [0.0000, 0.0000]])
    """

    why_no_integers = "its input has a scale per token, integer operators take one for all"

    def __init__(self, num_bits: int = 8) -> None:
        super().__init__()
        self.num_bits = num_bits

    def forward(self, x: Tensor, observe: bool = True) -> Tensor:
        """See :meth:`RangelessQuantizer.forward`."""
        return self.quantized(x) if takes_operators() else fake_quantize_tokens(x, self.num_bits)

    def quantized(self, x: Tensor) -> Tensor:
        """See :meth:`RangelessQuantizer.quantized`."""
        return quantize_tokens(x, self.num_bits)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"num_bits={self.num_bits}"


class FloatActivations(RangelessQuantizer):
    """Leaves activations as they are: only the weights of the layer are quantized.

    Example:
        >>> import torch
        >>> FloatActivations()(torch.tensor([0.014]))
        tensor([0.0140])
    """

    why_no_integers = "its input stays in float (algo: none)"

    def forward(self, x: Tensor, observe: bool = True) -> Tensor:
        """See :meth:`RangelessQuantizer.forward`."""
        return x

    def quantized(self, x: Tensor) -> Tensor:
        """See :meth:`RangelessQuantizer.quantized`."""
        return x
