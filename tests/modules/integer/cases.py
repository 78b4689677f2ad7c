"""Layers with their numbers, and what integer arithmetic has to give for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.modules.integer import Numbers, PackedWeight, integer_forward, why_not
from amct_lightning.quantizers.functional import dequantize_, half_range, quantize
from tests.sums import UNIT_ROUNDOFF

BITS = [(8, 8), (8, 4), (4, 8), (4, 4)]
HERE = [bits for bits in BITS if why_not(nn.Linear(1, 1), torch.device("cpu"), bits) is None] or BITS
"""Those that this CPU computes in integers."""
OPERATIONS = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass
class Case:
    """A layer, its input and the numbers that quantize both."""

    layer: Any
    x: Tensor
    numbers: Numbers

    @classmethod
    def make(cls, layer: nn.Module, x: Tensor, offset: float = 0.0, bits: tuple[int, int] = (8, 8)) -> Case:
        """Take scales that saturate some of the input and one of each weight's channels."""
        weight = layer.weight.detach().float()
        scale = weight.abs().flatten(1).amax(1) / (half_range(bits[1]) - 1)
        scale[0] *= 0.7
        begins_at_zero = offset == -half_range(bits[0])
        numbers = Numbers(torch.tensor(3 / 2 ** bits[0]), torch.tensor(float(offset)), scale, bits, begins_at_zero)
        return cls(layer, x, numbers)

    def integers(self, packed: PackedWeight | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The output, computed in integers; skips where this machine cannot."""
        reason = why_not(self.layer, torch.device("cpu"), self.numbers.num_bits)
        if reason is not None:
            pytest.skip(reason)
        weight, bias = self.layer.weight.detach(), self.layer.bias
        packed = PackedWeight() if packed is None else packed
        return integer_forward(self.layer, self.x, weight, bias, self.numbers, packed, dtype)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The exact output as float64, and the magnitude of what is added to the bias and of the bias."""
        x, weight = self.codes()
        sums = self._operate(x.double() - self.numbers.offset.double(), weight.double(), None)
        scale = self.numbers.weight_scale.double() * self.numbers.scale.double()
        shape = (-1, *[1] * (self.layer.weight.dim() - 2))
        product = sums * scale.view(shape)
        if self.layer.bias is None:
            return product, product.abs()
        bias = self.layer.bias.detach().double().view(shape)
        return product + bias, product.abs() + bias.abs()

    def in_float(self) -> tuple[Tensor, Tensor]:
        """What fake quantization gives in float, and how far it may be from the exact value."""
        numbers, (x, weight) = self.numbers, self.codes()
        x = dequantize_(x, numbers.scale, numbers.offset)
        weight = dequantize_(weight, self._spread_scale())
        output = self._operate(x, weight, self.layer.bias)
        terms = self._operate(x.abs(), weight.abs(), None if self.layer.bias is None else self.layer.bias.abs())
        return output, terms * (weight[0].numel() + 3) * UNIT_ROUNDOFF * 1.001

    def codes(self) -> tuple[Tensor, Tensor]:
        """The codes of input and weight, in float32 and in their memory formats."""
        numbers = self.numbers
        weight = self.layer.weight.detach().float()
        x = quantize(self.x.float(), numbers.scale, numbers.num_bits[0], numbers.offset)
        return x, _laid_out(quantize(weight, self._spread_scale(), numbers.num_bits[1]), weight)

    def float_layer(self) -> Tensor:
        """The output of the float layer, for its shape and memory format."""
        return copy.deepcopy(self.layer)(self.x)

    def _spread_scale(self) -> Tensor:
        return self.numbers.weight_scale.view(-1, *[1] * (self.layer.weight.dim() - 1))

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return OPERATIONS[type(layer)](x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=values.dtype).copy_(values)


def assert_exact(case: Case) -> None:
    """The output is the exact one but for four roundings: the sum, the scale, their product, the sum with the bias."""
    output = case.integers()
    expected, magnitude = case.exact()
    assert output.shape == expected.shape
    assert ((output.double() - expected).abs() <= 4.001 * UNIT_ROUNDOFF * magnitude).all()
