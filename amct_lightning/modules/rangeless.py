"""A Linear whose input has no range: a scale per token in every forward, or none at all."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from amct_lightning.modules.layers import QATLinear
from amct_lightning.quantizers.rangeless import RangelessQuantizer


class QATRangelessLinear(QATLinear, nn.Linear):
    """Quantized twin of :class:`torch.nn.Linear` with nothing to calibrate; it is quantized from the first batch on.

    It has an ``input_quantizer`` as other layers, but none that has clips, so that ``activation_quantizers`` is empty.

    Example:
        >>> import torch
        >>> from amct_lightning.quantizers import ChannelLayout, WeightQuantizer
        >>> from amct_lightning.quantizers.rangeless import TokenQuantizer
        >>> layer = nn.Linear(4, 2)
        >>> weights = WeightQuantizer(8, False, ChannelLayout(), layer.weight)
        >>> quantizers = {"input_quantizer": TokenQuantizer(8), "weight_quantizer": weights}
        >>> QATRangelessLinear.convert(layer, quantizers)(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """

    activation_quantizers: ClassVar[tuple[str, ...]] = ()
    input_quantizer: RangelessQuantizer  # type: ignore[assignment]

    def revert(self) -> None:
        """See :meth:`QATLayer.revert`."""
        del self.input_quantizer
        super().revert()

    def kept(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the input: backward needs its values only where those of the float layer would."""
        return input

    def _observe(self, input: Tensor) -> None:
        """There is nothing to calibrate."""
