"""The executor that is the reference of all others: one operator of torch after another, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from amct_lightning.quantizers.activation import ActivationQuantizer
from amct_lightning.quantizers.executors.factors import (
    Factors,
    GridWeight,
    WeightFactors,
    gradient_factor_of,
    on_device,
)
from amct_lightning.quantizers.executors.table import has_row
from amct_lightning.quantizers.functional import (
    dequantize_,
    device_codes,
    kept_bits,
    quantize,
    usable_scale,
)
from amct_lightning.quantizers.functions.activation import activation_gradients
from amct_lightning.quantizers.functions.weight import gradient_of_scale
from amct_lightning.quantizers.kept import evaluates, kept
from amct_lightning.quantizers.weight import WeightQuantizer

Quantizers = tuple[ActivationQuantizer, WeightQuantizer]
"""Those of input and weight."""

Tensors = tuple[Tensor, Tensor, Tensor | None]
"""Input, weight and bias of a layer."""

Forward = tuple[Tensor, Factors, WeightFactors]
"""The output of a layer, and what input and weight were quantized with."""


class Executor:
    """Computes what a quantized layer needs besides its product, in forward and in backward; without a graph.

    Backward gets the input and the weight as they were and rebuilds their quantized values, so that nothing is kept
    that a float layer does not keep. This class runs the formulas in operators of torch; others give the same integers.

    Attributes:
        name: What it is called in settings and reports.

    Example:
        >>> executor = Executor()
        >>> quantizer = ActivationQuantizer(num_bits=8, clip=(2.55, -1e-9), fixed_min=True)
        >>> with torch.no_grad():
        ...     values, factors = executor.quantize_input(quantizer, torch.tensor([0.014, 9.0]))
        >>> values, executor.rebuild_input(torch.tensor([0.021]), factors)
        (tensor([0.0100, 2.5500]), tensor([0.0200]))
    """

    name: ClassVar[str] = "composite"

    def product(
        self, quantizers: Quantizers, tensors: Tensors, geometry: tuple[int, ...], grid: tuple[bool, bool]
    ) -> Tensor | None:
        """Return the output of a layer in a training step with its graph, or ``None`` if that is not one operator.

        Args:
            quantizers: Those of input and weight.
            tensors: Input, weight and bias.
            geometry: Settings of a convolution one after another: stride, padding, dilation and output padding, one
                number per dimension each, whether it is transposed, and groups; empty for a linear layer.
            grid: Whether it computes on the device's grid, and whether the bias is added after that.
        """
        return None

    def with_backward(
        self, forward: Callable[[], Forward], quantizers: Quantizers, tensors: Tensors, geometry: tuple[int, ...]
    ) -> Tensor | None:
        """Return an output with the backward of :meth:`product`, or ``None`` if there is none for the layer.

        Args:
            forward: Gives the output and what input and weight were quantized with; called once, or not at all.
            quantizers: Those of input and weight.
            tensors: Input, weight and bias.
            geometry: See :meth:`product`.
        """
        return None

    def quantize_input(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True, observed: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """Return the fake-quantized input in its own dtype, and its factors; in training keep the quantizer's books.

        Args:
            quantizer: The quantizer of the input.
            x: The input, of any floating dtype.
            observe: Whether a calibrating quantizer counts it as a batch.
            observed: The tensor to calibrate on in its place, which has the same values.
        """
        factors = input_factors(quantizer, x if observed is None else observed, observe)
        return self.rebuild_input(x, factors), factors

    def input_codes(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True
    ) -> tuple[Tensor | None, Factors]:
        """Return the codes of the input, from 0 on, as uint8, and its factors; in training keep the quantizer's books.

        Args:
            quantizer: The quantizer of the input.
            x: The input, of any floating dtype.
            observe: Whether a calibrating quantizer counts it as a batch.

        Returns:
            The codes, ``None`` if they are left to whoever needs them; and the factors.
        """
        return None, input_factors(quantizer, x, observe)

    def rebuild_input(self, x: Tensor, factors: Factors) -> Tensor:
        """Return the fake-quantized input in its own dtype.

        Args:
            x: The input.
            factors: What :meth:`quantize_input` gave for it.
        """
        codes = quantize(x.float(), factors.scale, factors.num_bits, factors.offset)
        return dequantize_(codes, factors.scale, factors.offset).to(x.dtype)

    def input_gradients(
        self, x: Tensor, grad: Tensor, factors: Factors, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of the input and of both clips from that of the fake-quantized input.

        Args:
            x: The input.
            grad: The gradient, in any memory format; its memory may be used for that of the input.
            factors: What :meth:`quantize_input` gave for it.
            needs: Which of the three are wanted; the others are ``None``.
        """
        if factors.table is not None:
            factors.table.clear()  # an optimizer may write the clips from now on
        settings = factors.num_bits, torch.float32
        return activation_gradients((x, *factors[:4]), settings, needs, grad, factors.ends)

    def quantize_weight(self, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, WeightFactors]:
        """Return the fake-quantized weight in its own dtype, and its factors; keep the quantizer's books.

        Args:
            quantizer: The quantizer of the weight.
            weight: The weight.
        """
        factors = self.weight_factors(quantizer, weight)
        return self.rebuild_weight(weight, factors), factors

    def weight_factors(self, quantizer: WeightQuantizer, weight: Tensor) -> WeightFactors:
        """Return what the weight is quantized with; keep the quantizer's books.

        Args:
            quantizer: The quantizer of the weight.
            weight: The weight.
        """
        scale = quantizer.present_scale(weight.float())
        return WeightFactors(scale.detach(), quantizer.layout, quantizer.num_bits, gradient_factor_of(quantizer))

    def rebuild_weight(self, weight: Tensor, factors: WeightFactors) -> Tensor:
        """Return the fake-quantized weight in its own dtype.

        Args:
            weight: The weight.
            factors: What :meth:`quantize_weight` gave for it.
        """
        values = weight.float()
        codes = quantize(factors.layout.view(values), factors.scale, factors.num_bits)
        return dequantize_(codes, factors.scale).view_as(values).to(weight.dtype)

    def grid_input(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True, observed: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """Return the codes on the device's grid, less their offset, float32, and factors; as :meth:`quantize_input`."""
        factors = input_factors(quantizer, x if observed is None else observed, observe)
        return device_codes(x.float(), factors.scale, factors.num_bits, factors.offset, factors.dtype), factors

    def rebuild_grid_input(self, x: Tensor, factors: Factors) -> Tensor:
        """Return what the codes of the input on the device's grid stand for, float32.

        Args:
            x: The input.
            factors: What :meth:`grid_input` gave for it.
        """
        codes = device_codes(x.float(), factors.scale, factors.num_bits, factors.offset, factors.dtype)
        return codes.mul_(factors.scale)

    def grid_weight(self, quantizer: WeightQuantizer, weight: Tensor, input_scale: Tensor) -> GridWeight:
        """Return the weight on the device's grid; keep the quantizer's books.

        Args:
            quantizer: The quantizer of the weight.
            weight: The weight.
            input_scale: The scale of the input, 0-d float32.
        """
        factors = self.weight_factors(quantizer, weight)
        if quantizer.frozen:  # what was read from a file may be too small
            factors = factors._replace(scale=usable_scale(factors.scale))
        values, scale = weight.float(), on_device(factors).scale
        codes = quantize(factors.layout.view(values), scale, factors.num_bits).view_as(values)
        product = scale.flatten() * input_scale
        return GridWeight(codes, factors, product, kept_bits(product))

    def scale_gradient(self, weight: Tensor, grad: Tensor, factors: WeightFactors) -> Tensor:
        """Return the gradient of learned scales, 1-d, from that of the fake-quantized weight.

        Args:
            weight: The weight.
            grad: The gradient.
            factors: What :meth:`quantize_weight` gave for it.
        """
        scale, layout, num_bits, factor = factors
        return gradient_of_scale((weight.float(), scale), (layout, num_bits, factor), grad.float()).flatten()


def input_factors(quantizer: ActivationQuantizer, x: Tensor, observe: bool) -> Factors:
    """Return what an input is quantized with; in training keep the quantizer's books.

    Args:
        quantizer: The quantizer of the input.
        x: The input, of any floating dtype.
        observe: Whether a calibrating quantizer counts it as a batch.
    """
    table = quantizer.table
    if table is not None and quantizer.moves and has_row(quantizer):
        row = table.take(quantizer)
        quantizer.watch(x, row.width)
        numbers = row.upper, row.lower, row.scale, row.offset
        return Factors(*numbers, quantizer.num_bits, row.ends, table, quantizer.serving)
    if not evaluates(quantizer):
        return _computed_factors(quantizer, *quantizer.update_range(x, observe))
    key = quantizer.num_bits, quantizer.fixed_min, quantizer.frozen, quantizer.serving
    return kept(quantizer, quantizer.clips, key, lambda: _computed_factors(quantizer, *quantizer.usable_clips()))


@torch.no_grad()
def _computed_factors(quantizer: ActivationQuantizer, upper: Tensor, lower: Tensor) -> Factors:
    numbers = upper, lower, *quantizer.factors_of(upper, lower)
    return Factors(*numbers, quantizer.num_bits, dtype=quantizer.serving)


COMPOSITE = Executor()
"""The reference; it has no state."""
