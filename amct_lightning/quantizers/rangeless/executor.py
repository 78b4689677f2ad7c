"""An executor for a layer whose input has no range; its weight is left to another executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from amct_lightning.quantizers.executors import Executor, WeightFactors
from amct_lightning.quantizers.rangeless.quantizers import RangelessQuantizer
from amct_lightning.quantizers.weight import WeightQuantizer


class RangelessExecutor(Executor):
    """Computes what a layer needs of its input without keeping anything, and lets another executor do the rest.

    Args:
        inner: What runs the formulas of the weight.
        quantizer: The quantizer of the input.

    Example:
        >>> import torch
        >>> from amct_lightning.quantizers.rangeless import TokenQuantizer
        >>> executor = RangelessExecutor(Executor(), TokenQuantizer(8))
        >>> executor.rebuild_input(torch.tensor([1.27, 0.014]), None)
        tensor([1.2700, 0.0100])
    """

    def __init__(self, inner: Executor, quantizer: RangelessQuantizer) -> None:
        self.inner = inner
        self.input_quantizer = quantizer

    def quantize_input(
        self, quantizer: Any, x: Tensor, observe: bool = True, observed: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """See :meth:`Executor.quantize_input`; there are no factors."""
        return self.input_quantizer.quantized(x), None

    def rebuild_input(self, x: Tensor, factors: Any) -> Tensor:
        """See :meth:`Executor.rebuild_input`."""
        return self.input_quantizer.quantized(x)

    def input_gradients(
        self, x: Tensor, grad: Tensor, factors: Any, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :meth:`Executor.input_gradients`: the gradient passes straight through, whatever the input was."""
        return grad.to(x.dtype) if needs[0] else None, None, None

    def quantize_weight(self, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, WeightFactors]:
        """See :meth:`Executor.quantize_weight`."""
        return self.inner.quantize_weight(quantizer, weight)

    def rebuild_weight(self, weight: Tensor, factors: WeightFactors) -> Tensor:
        """See :meth:`Executor.rebuild_weight`."""
        return self.inner.rebuild_weight(weight, factors)

    def scale_gradient(self, weight: Tensor, grad: Tensor, factors: WeightFactors) -> Tensor:
        """See :meth:`Executor.scale_gradient`."""
        return self.inner.scale_gradient(weight, grad, factors)
