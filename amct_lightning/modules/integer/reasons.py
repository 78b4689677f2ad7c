"""Why a layer is not computed in integers on some device; the words go into the conversion report."""

from __future__ import annotations

import torch
from torch import nn

from amct_lightning.modules.integer import matmul, onednn
from amct_lightning.modules.integer.numbers import Convolution, geometry_of
from amct_lightning.quantizers.functional import half_range

MOST_BITS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SUM = 2**31 - 1
CONVOLUTIONS = {
    "cuda": "torch has no integer convolution for CUDA devices",
    "npu": "npu_quant_conv2d of torch_npu gives float16, and wants the zero point on the host, which would wait",
}
"""Type of device -> why its integer products are those of linear layers only."""


def why_not(layer: nn.Module, device: torch.device, num_bits: tuple[int, int]) -> str | None:
    """Say why a layer cannot be computed in integers, or ``None`` if it can.

    Args:
        layer: The layer, float or quantized.
        device: The device that it is to run on.
        num_bits: Numbers of bits of its input and of its weight.

    Example:
        >>> why_not(nn.LSTM(2, 2), torch.device("cpu"), (8, 8))
        'no integer operator computes a layer of type LSTM'
        >>> why_not(nn.Linear(2, 2), torch.device("cpu"), (16, 8))
        'its activations have 16 bits, integer operators take 8 at most'
    """
    if not isinstance(layer, nn.Linear | Convolution):
        return f"no integer operator computes a layer of type {type(layer).__name__.removeprefix('QAT')}"
    if num_bits[0] > MOST_BITS:
        return f"its activations have {num_bits[0]} bits, integer operators take {MOST_BITS} at most"
    if layer.weight.dtype not in DTYPES:
        return f"its weight is {layer.weight.dtype}, integer sums become float32"
    return _of_padding(layer) or _of_sums(layer, num_bits) or _of_device(layer, device, num_bits)


def _of_padding(layer: nn.Linear | Convolution) -> str | None:
    if isinstance(layer, nn.Linear):
        return None
    if layer.padding_mode != "zeros":
        return f"padding_mode is '{layer.padding_mode}', integer operators pad with zeros only"
    if geometry_of(layer) is None:
        return "padding='same' needs more zeros at one end than at the other, integer operators pad both alike"
    return None


def _of_sums(layer: nn.Linear | Convolution, num_bits: tuple[int, int]) -> str | None:
    terms = layer.weight[0].numel()
    if terms * (2 ** num_bits[0] - 1) * half_range(num_bits[1]) > LARGEST_SUM:
        return f"a sum of {terms} products may exceed 32 bits"
    return None


def _of_device(layer: nn.Linear | Convolution, device: torch.device, num_bits: tuple[int, int]) -> str | None:
    if device.type == "cpu":
        return onednn.obstacle(2 if isinstance(layer, nn.Linear) else len(layer.kernel_size), num_bits)
    if device.type not in matmul.PRODUCTS:
        return f"there are no integer operators for devices of type '{device.type}'"
    return matmul.obstacle(device, layer.out_features) if isinstance(layer, nn.Linear) else CONVOLUTIONS[device.type]
