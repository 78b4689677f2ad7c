"""The quantized layers written down from the formulas, in plain differentiable torch.

Nothing here is shared with the package: no scale is vectorized, no gradient is written by hand. A gradient that
is not the one of the formula as it stands (straight-through, learned scales) comes from ``x + (y - x).detach()``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def quantized_activation(x: Tensor, clip_max: float, clip_min: float, bits: int) -> Tensor:
    """``(clamp(round(x/s + o), -h, h-1) - o) * s``; the gradient is cut off outside the range."""
    h = 2 ** (bits - 1)
    scale = torch.tensor(clip_max - clip_min) / (2**bits - 1)
    offset = torch.round(-h - torch.tensor(clip_min) / scale)
    y = ((x / scale + offset).round().clamp(-h, h - 1) - offset) * scale
    passes = (x <= scale * (h - 1 - offset)) & (x >= scale * (-h - offset))
    return (x + (y - x).detach()) * passes + y.detach() * ~passes


def channels(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """Views of a weight, one per output channel."""
    if is_transposed(layer):
        return [piece[:, j] for piece in weight.chunk(layer.groups) for j in range(weight.shape[1])]
    return list(weight)


def max_abs_scale(piece: Tensor, h: int) -> Tensor:
    return piece.abs().max() / (h - 1 + int(piece.max().abs() < piece.min().abs()))


class WeightQuantization:
    """One weight under one algorithm; ``scales`` are the leaves that learned scales would train."""

    def __init__(self, layer: nn.Module, weight: Tensor, bits: int, channel_wise: bool, learned: bool) -> None:
        self.h = 2 ** (bits - 1)
        self.layer, self.learned, self.channel_wise = layer, learned, channel_wise
        pieces = channels(layer, weight.detach()) if channel_wise else [weight.detach()]
        self.scales = [max_abs_scale(piece, self.h).requires_grad_(learned) for piece in pieces]

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, connected to ``weight`` and, if learned, to the scales."""
        pieces = channels(self.layer, weight) if self.channel_wise else [weight]
        quantized = [self._piece(piece, scale) for piece, scale in zip(pieces, self.scales, strict=True)]
        if not self.channel_wise:
            return quantized[0]
        if not is_transposed(self.layer):
            return torch.stack(quantized)
        per_group = len(quantized) // self.layer.groups
        groups = [torch.stack(quantized[i : i + per_group], dim=1) for i in range(0, len(quantized), per_group)]
        return torch.cat(groups)

    def _piece(self, w: Tensor, s: Tensor) -> Tensor:
        y = (w / s).round().clamp(-self.h, self.h - 1) * s
        straight = w + (y - w).detach()
        if not self.learned:
            return straight
        fixed, z = s.detach(), (w / s).detach()
        above, below = w.detach() > fixed * (self.h - 1), w.detach() < -fixed * self.h
        step = torch.where(above, self.h - 1.0, torch.where(below, -float(self.h), z.round() - z))
        slope = step / math.sqrt(self._elements(w) * (self.h - 1))
        return straight + slope * (s - fixed)

    def _elements(self, w: Tensor) -> float:
        if self.channel_wise:
            return w.numel()
        if w.dim() in (3, 5):
            return self.layer.in_channels // self.layer.groups
        return w.numel() // (self.layer.out_channels if is_transposed(self.layer) else w.shape[0])


def forward(layer: Any, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
    """A float layer's operation on a quantized input and weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    dims = x.dim() - 2
    if not is_transposed(layer):
        return CONVOLUTIONS[dims](x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    extra = layer.output_padding
    if output_size is not None:
        # A transposed convolution that has to reach a given size pads its output up to it.
        geometry = zip(x.shape[2:], layer.stride, layer.padding, layer.kernel_size, strict=True)
        smallest = [(n - 1) * s - 2 * p + k for n, s, p, k in geometry]
        extra = [a - b for a, b in zip(output_size, smallest, strict=True)]
    return TRANSPOSED[dims](x, weight, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


def recurrent(
    layer: Any, x: Tensor, clips: dict[str, tuple[float, float]], bits: int, weights: tuple[Tensor, Tensor]
) -> Tensor:
    """The outputs of a quantized LSTM or GRU that starts from zeros, step by step; ``x`` is (time, batch, features)."""
    w, r = weights
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    outputs = []
    for step in x:
        inputs = F.linear(quantized_activation(step, *clips["input"], bits), w, getattr(layer, "bias_ih_l0", None))
        hq = quantized_activation(h, *clips["hidden"], bits)
        hidden = F.linear(hq, r, getattr(layer, "bias_hh_l0", None))
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (inputs + hidden).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            reset, update = (
                torch.sigmoid((inputs + hidden).chunk(3, 1)[0]),
                torch.sigmoid((inputs + hidden).chunk(3, 1)[1]),
            )
            new = torch.tanh(inputs.chunk(3, 1)[2] + reset * hidden.chunk(3, 1)[2])
            h = (1 - update) * new + update * hq
        outputs.append(h)
    return torch.stack(outputs)
