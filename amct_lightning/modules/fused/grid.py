"""A product on the grid of device or server, as one operation for autograd: codes forward, their values backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amct_lightning.modules.deployed import bias_codes, scales_of_sums
from amct_lightning.modules.fused.products import Gradients, Needs, Product
from amct_lightning.modules.grid.sums import in_float32
from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer
from amct_lightning.quantizers.executors import Executor, Factors, WeightFactors, on_device


@dataclass(frozen=True)
class GridProduct:
    """The product of a layer on the device's grid in training, without a graph; its sums are those of float32.

    Attributes:
        product: The operation of the layer.
        executor: What runs the formulas of its quantizers.
        bias_follows: Whether the deployed operator takes no bias, which is then added in float.
    """

    product: Product
    executor: Executor
    bias_follows: bool

    def forward(
        self,
        quantizers: tuple[ActivationQuantizer, WeightQuantizer],
        tensors: tuple[Tensor, Tensor, Tensor | None],
        observe: bool,
        observed: Tensor | None,
    ) -> tuple[Tensor, Factors, WeightFactors]:
        """Return the output, and what input and weight were quantized with.

        It is in float32, or in the dtype of a server that computes it.

        Args:
            quantizers: Those of input and weight.
            tensors: Input, weight and bias.
            observe: Whether a calibrating quantizer counts the input as a batch.
            observed: The input before it was padded, to calibrate on.
        """
        x, weight, bias = tensors
        codes, factors = self.executor.grid_input(quantizers[0], x, observe, observed)
        grid = self.executor.grid_weight(quantizers[1], weight, factors.scale)
        scale, kept = scales_of_sums(grid.scale, grid.kept, factors.dtype)
        shape = -1, *[1] * (weight.dim() - 2)
        with in_float32(x.device.type):
            output = self.product.forward(codes, grid.codes, None)
        if bias is not None and not self.bias_follows:
            output.add_(bias_codes(bias.float(), scale, factors.dtype is not None).view(shape))
        output.mul_(kept.view(shape))
        if bias is not None and self.bias_follows:
            output.add_(bias.float())
        return output if factors.dtype is None else output.to(factors.dtype), factors, grid.factors

    def backward(
        self, grad: Tensor, tensors: tuple[Tensor, Tensor], factors: tuple[Factors, WeightFactors], needs: Needs
    ) -> Gradients:
        """Return the gradients of the product, in float32, as if it were that of the values that the codes stand for.

        Args:
            grad: Gradient of the output.
            tensors: Input and weight.
            factors: What :meth:`forward` gave for them.
            needs: Which gradients are wanted.
        """
        (x, weight), executor = tensors, self.executor
        values = executor.rebuild_grid_input(x, factors[0]) if needs[1] else x.float()
        weights = weight.float()
        if needs[0]:
            weights = executor.rebuild_weight(weights, on_device(factors[1]))
        with in_float32(x.device.type):  # a backward within autocast would round what it multiplies
            return self.product.backward(grad.float(), values, weights, needs)
