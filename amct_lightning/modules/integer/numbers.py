"""What the integer product of a layer is told besides its tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""The convolutions that have an integer product."""


class Numbers(NamedTuple):
    """What turns numbers into integers and back.

    Attributes:
        scale: Scale of the input, 0-d float32.
        offset: Offset of the input, an integer in a 0-d float32 tensor.
        weight_scale: Scales of the weight, 1-d float32: one per output channel, or a single one.
        num_bits: Numbers of bits of input and weight, 8 at most.
        begins_at_zero: Whether the lowest code is known to stand for 0 at any time, as it does where the lower clip is
            fixed to 0. Convolutions that pad are then computed with fewer steps.
    """

    scale: Tensor
    offset: Tensor
    weight_scale: Tensor
    num_bits: tuple[int, int] = (8, 8)
    begins_at_zero: bool = False


class Geometry(NamedTuple):
    """Where the products of a convolution are.

    Attributes:
        stride: Stride per dimension.
        padding: Zeros at either end, per dimension.
        dilation: Dilation per dimension.
        groups: Number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


POINT = Geometry((1, 1), (0, 0), (1, 1))
"""A convolution of one point, which is a linear layer."""


def geometry_of(layer: Convolution) -> Geometry | None:
    """Return the geometry of a convolution, or ``None`` if its two ends need different numbers of zeros.

    Args:
        layer: A convolution that pads with zeros.

    Example:
        >>> geometry_of(nn.Conv2d(1, 1, 3, padding="same")).padding
        (1, 1)
    """
    padding = layer.padding
    if isinstance(padding, str):
        wide = 1 if padding == "same" else 0
        zeros = [wide * d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(number % 2 for number in zeros):
            return None
        padding = tuple(number // 2 for number in zeros)
    return Geometry(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)
