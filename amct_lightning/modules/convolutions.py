"""The QAT twins of the convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.modules.fused.forward import run_fused
from amct_lightning.modules.fused.products import convolution
from amct_lightning.modules.layers import QATLayer


class _QATConv(QATLayer):
    _conv_forward: Any
    _reversed_padding_repeated_twice: list[int]
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, bias))

    def _run_fused(self, input: Tensor, weight: Tensor) -> Tensor:
        x, padding = _with_batch(input, len(self.stride)), self.padding
        if isinstance(padding, str):  # what it stands for is private to torch.nn
            x, padding = _pad_to_same(x, self._reversed_padding_repeated_twice)
        product = convolution(self.stride, padding, self.dilation, False, (0,) * len(self.stride), self.groups)
        output = run_fused(self, product, x, weight, None if x is input else input)
        return output if input.dim() == x.dim() else output.squeeze(0)


class QATConv1d(_QATConv, nn.Conv1d):
    """Quantized twin of :class:`torch.nn.Conv1d`."""


class QATConv2d(_QATConv, nn.Conv2d):
    """Quantized twin of :class:`torch.nn.Conv2d`."""


class QATConv3d(_QATConv, nn.Conv3d):
    """Quantized twin of :class:`torch.nn.Conv3d`."""


class _QATConvTranspose(QATLayer):
    _output_padding: Any
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        # _output_padding is private to torch.nn, but the only place that turns output_size into padding.
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        operate = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return operate(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)

    def _run_fused(self, input: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        added = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        x = _with_batch(input, dims)
        product = convolution(self.stride, self.padding, self.dilation, True, tuple(added), self.groups)
        output = run_fused(self, product, x, weight, None if x is input else input)
        return output if input.dim() == x.dim() else output.squeeze(0)


class QATConvTranspose1d(_QATConvTranspose, nn.ConvTranspose1d):
    """Quantized twin of :class:`torch.nn.ConvTranspose1d`."""


class QATConvTranspose2d(_QATConvTranspose, nn.ConvTranspose2d):
    """Quantized twin of :class:`torch.nn.ConvTranspose2d`."""


class QATConvTranspose3d(_QATConvTranspose, nn.ConvTranspose3d):
    """Quantized twin of :class:`torch.nn.ConvTranspose3d`."""


def _with_batch(x: Tensor, dims: int) -> Tensor:
    """Return an input with an axis for the batch, which it may lack."""
    return x.unsqueeze(0) if x.dim() == dims + 1 else x


def _pad_to_same(x: Tensor, padding: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input and what is left to pad on both sides, so that the output is as large as the input.

    Args:
        x: The input.
        padding: What to pad before and after, last dimension first; 0 quantizes to 0, so it may be padded before.
    """
    before, after = padding[::2], padding[1::2]
    both = [min(pair) for pair in zip(before, after, strict=True)]
    rest = [side - common for pair, common in zip(zip(before, after, strict=True), both, strict=True) for side in pair]
    return (F.pad(x, rest) if any(rest) else x), tuple(reversed(both))
