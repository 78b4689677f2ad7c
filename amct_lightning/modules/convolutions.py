"""The QAT twins of the convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.modules.layers import QATLayer


class _QATConv(QATLayer):
    _conv_forward: Any
    bias: Tensor | None

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, bias))


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


class QATConvTranspose1d(_QATConvTranspose, nn.ConvTranspose1d):
    """Quantized twin of :class:`torch.nn.ConvTranspose1d`."""


class QATConvTranspose2d(_QATConvTranspose, nn.ConvTranspose2d):
    """Quantized twin of :class:`torch.nn.ConvTranspose2d`."""


class QATConvTranspose3d(_QATConvTranspose, nn.ConvTranspose3d):
    """Quantized twin of :class:`torch.nn.ConvTranspose3d`."""
