"""What layers compute from input, weight and bias, with its gradients: products of matrices and convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
"""Of input, weight and bias."""

Needs = tuple[bool, bool, bool]
"""Which of the three are wanted."""


class Product(Protocol):
    """The operation of a layer.

    Attributes:
        keeps_both: Whether torch keeps input and weight for backward even if only one of them is needed.
    """

    keeps_both: ClassVar[bool]

    @property
    def geometry(self) -> tuple[int, ...]:
        """All settings one after another, as an operator in C++ takes them; empty for a product of matrices."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output."""
        ...

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients that are wanted, from that of the output; what is not needed for it may have any values.

        Args:
            grad: Gradient of the output.
            x: The input.
            weight: The weight.
            needs: Which gradients are wanted.
        """
        ...


class MatrixProduct:
    """``x @ weight.T + bias``, for inputs of any rank.

    Example:
        >>> MatrixProduct().forward(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1)).flatten()
        tensor([4., 4.])
    """

    keeps_both: ClassVar[bool] = False
    geometry: ClassVar[tuple[int, ...]] = ()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output."""
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients that are wanted."""
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = rows.mm(weight).view(x.shape) if needs[0] else None
        of_weight = rows.t().mm(x.reshape(-1, x.shape[-1])) if needs[1] else None
        return of_x, of_weight, rows.sum(0) if needs[2] else None


@dataclass(frozen=True)
class Convolution:
    """A convolution in any number of dimensions, or a transposed one; the input has an axis for the batch.

    Attributes:
        stride: Stride, per dimension, as the rest.
        padding: Padding with zeros.
        dilation: Dilation.
        transposed: Whether it is a transposed one.
        output_padding: Its additional size, 0 otherwise.
        groups: Number of groups.

    Example:
        >>> conv = Convolution((1,), (0,), (1,), False, (0,), 1)
        >>> conv.forward(torch.ones(1, 1, 4), torch.ones(1, 1, 3), None)
        tensor([[[3., 3.]]])
    """

    keeps_both: ClassVar[bool] = True

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output."""
        return torch.convolution(x, weight, bias, *self._settings)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients that are wanted."""
        channels = [grad.shape[1]] if needs[2] else None
        found = torch.ops.aten.convolution_backward(grad, x, weight, channels, *self._settings, needs)
        of_x, of_weight, of_bias = (part if need else None for part, need in zip(found, needs, strict=True))
        return of_x, of_weight, of_bias

    @cached_property
    def geometry(self) -> tuple[int, ...]:
        """Stride, padding, dilation, output padding, whether it is transposed, and groups."""
        *per_dimension, transposed, output_padding, groups = self._settings
        return (*(number for part in (*per_dimension, output_padding) for number in part), transposed, groups)

    @property
    def _settings(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups


@cache
def convolution(
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
    output_padding: tuple[int, ...],
    groups: int,
) -> Convolution:
    """Return a convolution; the same object for the same settings, as it takes longer to make than to run.

    Args:
        stride: See :class:`Convolution`, as the rest.
        padding: Padding with zeros.
        dilation: Dilation.
        transposed: Whether it is a transposed one.
        output_padding: Its additional size.
        groups: Number of groups.

    Example:
        >>> settings = (1,), (0,), (1,), False, (0,), 1
        >>> convolution(*settings) is convolution(*settings)
        True
    """
    return Convolution(stride, padding, dilation, transposed, output_padding, groups)


MATRIX_PRODUCT = MatrixProduct()
"""It has no settings."""
