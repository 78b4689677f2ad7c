"""The quantized layers written down from the formulas, in plain differentiable torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quantized_activation(x: Tensor, clip_max: float, clip_min: float, bits: int) -> Tensor:
    """``(clamp(round(x/s + o), -h, h-1) - o) * s``; the gradient is cut off outside the range."""
    h = 2 ** (bits - 1)
    scale = torch.tensor(clip_max - clip_min) / (2**bits - 1)
    offset = torch.round(-h - torch.tensor(clip_min) / scale)
    y = ((x / scale + offset).round().clamp(-h, h - 1) - offset) * scale
    passes = (x <= scale * (h - 1 - offset)) & (x >= scale * (-h - offset))
    return (x + (y - x).detach()) * passes + y.detach() * ~passes


def quantized_weight(layer: Any, weight: Tensor, bits: int) -> Tensor:
    """``clamp(round(w/s), -h, h-1) * s`` with one scale per output channel, for Linear one for all."""
    h = 2 ** (bits - 1)
    if isinstance(layer, nn.Linear):
        pieces = [weight]
    elif isinstance(layer, nn.ConvTranspose2d):
        pieces = [piece[:, j] for piece in weight.chunk(layer.groups) for j in range(weight.shape[1])]
    else:
        pieces = list(weight)
    y = torch.empty_like(weight)
    targets = (
        [piece[:, j] for piece in y.chunk(layer.groups) for j in range(weight.shape[1])]
        if isinstance(layer, nn.ConvTranspose2d)
        else ([y] if isinstance(layer, nn.Linear) else list(y))
    )
    for piece, target in zip(pieces, targets, strict=True):
        negative = piece.max().abs() < piece.min().abs()
        scale = piece.abs().max() / (h - 1 + int(negative))
        target.copy_((piece / scale).round().clamp(-h, h - 1) * scale)
    return y


def forward(float_model: Any, x: Tensor, clip_max: float, clip_min: float, bits: tuple[int, int]) -> Tensor:
    """The float model's layer on quantized input and weight; ``x`` and the parameters get gradients."""
    layer = float_model.layer
    a_bits, w_bits = bits
    quantized = quantized_weight(layer, layer.weight.detach(), w_bits)
    weight = layer.weight + (quantized - layer.weight).detach()
    x = quantized_activation(x, clip_max, clip_min, a_bits)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, nn.ConvTranspose2d):
        # A transposed convolution that has to reach a given size pads its output up to it.
        needed = float_model.call.get("output_size")
        size = [(n - 1) * s - 2 * p + k for n, s, p, k in _geometry(layer, x)]
        extra = [a - b for a, b in zip(needed, size, strict=True)] if needed else layer.output_padding
        return F.conv_transpose2d(
            x, weight, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation
        )
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _geometry(layer: nn.ConvTranspose2d, x: Tensor) -> list[tuple[int, int, int, int]]:
    return list(zip(x.shape[2:], layer.stride, layer.padding, layer.kernel_size, strict=True))
