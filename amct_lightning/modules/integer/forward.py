"""The output of a layer, by whichever operators the device has for integer products."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.modules.integer import matmul, onednn
from amct_lightning.modules.integer.codes import CHANNELS_LAST, ToCodes, unsigned_codes
from amct_lightning.modules.integer.numbers import Convolution, Numbers, geometry_of
from amct_lightning.modules.integer.packed import PackedWeight


@torch.no_grad()
def integer_forward(
    layer: nn.Linear | Convolution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: Numbers,
    packed: PackedWeight,
    dtype: torch.dtype | None = None,
    to_codes: ToCodes = unsigned_codes,
) -> Tensor:
    """Return the layer's output, its products summed up in integers.

    The sum over ``(q_x - o) * q_w`` is exact in 32 bits, becomes a float32 number and is multiplied by ``s_x * s_w``;
    then the bias is added. Zeros that pad the input stay zeros. A NaN in the input has a code, as on the device.

    Args:
        layer: The layer, for which :func:`why_not` has found no reason. Its weight and bias are not looked at.
        x: Input as the float layer takes it.
        weight: Weight, in float.
        bias: Bias, if there is one.
        numbers: Scales, offset and numbers of bits.
        packed: What keeps the packed weight for the next call; one for each layer.
        dtype: Dtype of the output; ``None`` for that of ``x``.
        to_codes: What gives the codes of the input on CPUs, such as :func:`unsigned_codes` or that function compiled.

    Returns:
        The output in shape and memory format of the float layer's, without a gradient.

    Example:
        >>> numbers = Numbers(torch.tensor(0.1), torch.tensor(-128.0), torch.tensor([0.5]))
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[0.31, 0.18]])
        >>> integer_forward(layer, x, torch.tensor([[1.1, -2.0]]), None, numbers, PackedWeight())
        tensor([[-0.1000]])
    """
    dtype = dtype or x.dtype
    if isinstance(layer, nn.Linear):
        if not x.numel() or x.shape[-1] != weight.shape[1]:
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return _linear(x, weight, bias, numbers, packed, to_codes).to(dtype)
    if not (x.numel() and _fits(layer, x)):
        return _in_float(layer, x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    geometry = geometry_of(layer)
    assert geometry is not None
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    output = onednn.convolution(batched, weight, bias, numbers, packed, geometry, to_codes).to(dtype)
    if not (is_channels_last(batched) or is_channels_last(weight)):
        output = output.reshape(-1).view(output.shape)  # contiguous() leaves the strides of axes of length 1
    return output if batched is x else output.squeeze(0)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Numbers, packed: PackedWeight, to_codes: ToCodes
) -> Tensor:
    product = matmul.PRODUCTS.get(x.device.type)
    if product is not None:
        return matmul.linear(x, weight, bias, numbers, product)
    return onednn.linear(x, weight, bias, numbers, packed, to_codes)


def is_channels_last(tensor: Tensor) -> bool:
    """Tell whether a float convolution of two or three dimensions gives its output channels last, given this tensor.

    Args:
        tensor: Its input or weight.

    Example:
        >>> is_channels_last(torch.ones(1, 1, 2, 2)), is_channels_last(torch.ones(1, 2, 2, 3).permute(0, 3, 1, 2))
        (False, True)
    """
    layout = CHANNELS_LAST.get(tensor.dim())
    if layout is None or not tensor.is_contiguous(memory_format=layout):
        return False
    # Where an axis has one element both formats may be the same memory; the strides tell which one is meant.
    size, channels = tensor[0].numel(), tensor.shape[1]
    return size > 1 and tensor.stride(0) >= size and tensor.stride(1) == 1 and tensor.stride(-1) >= channels


def _fits(layer: Convolution, x: Tensor) -> bool:
    """Tell whether the layer takes such an input; if not, the float layer has the words to say so."""
    dims = len(layer.kernel_size)
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != layer.in_channels:
        return False
    geometry = geometry_of(layer)
    assert geometry is not None
    spans = (d * (k - 1) + 1 for d, k in zip(geometry.dilation, layer.kernel_size, strict=True))
    padded = (length + 2 * p for length, p in zip(x.shape[-dims:], geometry.padding, strict=True))
    return all(length >= span for length, span in zip(padded, spans, strict=True))


def _in_float(layer: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Private to torch.nn, but the one place that knows of all ways to pad.
    return cast(Tensor, layer._conv_forward(x, weight, bias))
