"""The device's arithmetic on the CPU: codes, exact integer sums that wrap around at 32 bits, and dequantization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amct_lightning.quantizers.functional import KEPT_BITS

EXACT_IN_FLOAT32 = 2**24
"""Sums of integers stay exact in float32, in any order, while the sum of their magnitudes is below this."""

_INT32_RANGE = (-(2**31), 2**31 - 1)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def quantize(x: Tensor, factor: float, offset: float, num_bits: int, divides: bool = False) -> Tensor:
    """Return the codes of a tensor as AscendQuant makes them: ``clamp(round(x * factor) + offset)``, all in float32.

    Args:
        x: The values, float32.
        factor: The factor as it stands in the file: the reciprocal of the scale, or the scale itself.
        offset: The code of the real value 0.
        num_bits: 4, 8 or 16.
        divides: Whether the factor is the scale, as ONNX's QuantizeLinear has it.

    Returns:
        The codes, integers in float32.

    Example:
        >>> quantize(torch.tensor([0.26, -9.0, 0.5]), 10.0, -3.0, 4)
        tensor([ 0., -8.,  2.])
    """
    half = 2.0 ** (num_bits - 1)
    number = torch.tensor(factor, dtype=torch.float32)
    scaled = x.float() / number if divides else x.float() * number
    return (torch.round(scaled) + offset).clamp(-half, half - 1)


def unpack_int4(packed: np.ndarray, axis: int) -> np.ndarray:
    """Return INT4 weights of which a file holds two per byte: the even index in the low bits, the odd one in the high.

    Args:
        packed: The bytes, int8.
        axis: The axis along which they are packed, that of the input channels.

    Returns:
        The weights, int8; the axis is twice as long.

    Example:
        >>> unpack_int4(np.array([[0x21, -1]], dtype=np.int8), axis=1)
        array([[ 1,  2, -1, -1]], dtype=int8)
    """
    low, high = np.right_shift(np.left_shift(packed, 4), 4), np.right_shift(packed, 4)
    pairs = np.stack((low, high), axis=axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def dequant_scale(parameter: np.ndarray, bits: int = 19) -> np.ndarray:
    """Return by what the device multiplies its sums: the float32 number in the low 32 bits, of which it keeps 19.

    Args:
        parameter: The dequantization parameters of a file, uint64.
        bits: 19, or 32 for the whole number.

    Returns:
        The scales, 1-d float32.

    Example:
        >>> float(dequant_scale(np.array([np.float32(0.03).view(np.uint32)], dtype=np.uint64))[0])
        0.029998779296875
    """
    pattern = (np.asarray(parameter, dtype=np.uint64).ravel() & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return kept_bits(pattern.view(np.float32), bits)


def check_bits(bits: int) -> None:
    """Refuse a number of bits that is neither that of the device nor that of the file.

    Args:
        bits: The number.

    Raises:
        ValueError: If it is not 19 or 32.
    """
    if bits not in (19, 32):
        raise ValueError(f"deq_bits is {bits!r}, it must be 19, as the device computes, or 32 for comparison.")


def kept_bits(scale: np.ndarray, bits: int = 19) -> np.ndarray:
    """Return float32 scales with the bits that the device keeps: 19 of them, or all 32."""
    check_bits(bits)
    if bits == 32:
        return scale
    return (scale.view(np.uint32) & np.uint32(KEPT_BITS & 0xFFFFFFFF)).view(np.float32)


def int32_sums(sums: Tensor, bias: Tensor | None = None) -> tuple[Tensor, int]:
    """Return sums and bias added as 32 bits in two's complement hold them, and how many do not fit and so wrap around.

    Args:
        sums: The sums, exact integers in float32 or float64.
        bias: The integers to add, int64, shaped to broadcast.

    Returns:
        The sums, int32, and the number of overflows.

    Example:
        >>> int32_sums(torch.tensor([2.0**31 - 1, -5.0], dtype=torch.float64), torch.tensor(1))
        (tensor([-2147483648,          -4], dtype=torch.int32), 1)
    """
    largest = float(torch.stack(sums.aminmax()).abs().max()) if sums.numel() else 0.0
    added = 0 if bias is None else int(bias.abs().max())
    if largest + added <= _INT32_RANGE[1]:
        return (sums.int() if bias is None else sums.int() + bias.int()), 0
    whole = sums.long() if bias is None else sums.long() + bias
    overflows = int(((whole < _INT32_RANGE[0]) | (whole > _INT32_RANGE[1])).sum())
    return (((whole + 2**31) & 0xFFFFFFFF) - 2**31).int(), overflows


def dequantize(sums: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return sums times their scale, in float32; rounded to float16 if that is what the device puts out.

    Args:
        sums: The sums, int32.
        scale: The scales, shaped to broadcast.
        dtype: ``torch.float32`` or ``torch.float16``.

    Returns:
        The outputs, float32.
    """
    return (sums.float() * scale).to(dtype).float()


def convolution_sums(kind: str, x: Tensor, weight: Tensor, attributes: dict[str, Any]) -> Tensor:
    """Return the exact sums of a convolution over integers; what is padded is 0.

    Args:
        kind: ``"Conv"`` or ``"ConvTranspose"``, with ONNX's meaning of weight and attributes.
        x: Codes less their offset, integers in float32.
        weight: The integers of the weight, int8.
        attributes: Those of the ONNX node.

    Returns:
        The sums, integers in float32 or float64, exact.

    Example:
        >>> convolution_sums("Conv", torch.ones(1, 1, 3), torch.ones(1, 1, 2, dtype=torch.int8), {"pads": [1, 0]})
        tensor([[[1., 2., 2.]]])
    """
    spatial = x.dim() - 2
    pads = list(attributes.get("pads") or [0] * 2 * spatial)
    begin, end = pads[:spatial], pads[spatial:]
    strides, dilations = (tuple(attributes.get(name) or [1] * spatial) for name in ("strides", "dilations"))
    groups = int(attributes.get("group", 1))
    if kind == "Conv":
        symmetric = begin == end
        if not symmetric:
            x = F.pad(x, [pad for pair in zip(reversed(begin), reversed(end), strict=True) for pad in pair])

        def operate(x: Tensor, w: Tensor) -> Tensor:
            padding = tuple(begin) if symmetric else 0
            return _CONV[x.dim()](x, w, None, strides, padding, dilations, groups)

        return _exact(operate, x, weight, 0)

    def operate_transposed(x: Tensor, w: Tensor) -> Tensor:
        more = tuple(attributes.get("output_padding") or [0] * spatial)
        full = _CONV_TRANSPOSE[x.dim()](x, w, None, strides, 0, more, groups, dilations)
        for axis, (first, last) in enumerate(zip(begin, end, strict=True), 2):
            full = full.narrow(axis, first, full.shape[axis] - first - last)
        return full

    return _exact(operate_transposed, x, weight, 1)


def matmul_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return the exact sums of a product of integers.

    Args:
        x: Codes less their offset, integers in float32, (..., K).
        weight: The integers of the weight, int8, (K, N).

    Returns:
        The sums, integers in float32 or float64, exact.

    Example:
        >>> matmul_sums(torch.tensor([[1.0, -2.0]]), torch.tensor([[3], [4]], dtype=torch.int8))
        tensor([[-5.]])
    """
    return _exact(torch.matmul, x, weight, weight.dim() - 1)


def _exact(operate: Any, x: Tensor, weight: Tensor, channel_axis: int) -> Tensor:
    """Compute in float32 if no partial sum can leave the integers that it holds exactly, else in float64."""
    others = [axis for axis in range(weight.dim()) if axis != channel_axis]
    largest = float(weight.short().abs().sum(others, dtype=torch.int64).max()) if weight.numel() else 0.0
    bound = largest * (float(x.abs().max()) if x.numel() else 0.0)
    dtype = torch.float32 if bound < EXACT_IN_FLOAT32 else torch.float64
    with torch.no_grad(), _full_precision():
        result: Tensor = operate(x.to(dtype), weight.to(dtype))
    return result


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep torch from computing products with fewer bits than float32 has, which the process may have allowed it."""
    precision = torch.get_float32_matmul_precision()
    mkldnn = getattr(torch.backends.mkldnn, "conv", None)
    convolutions = getattr(mkldnn, "fp32_precision", None)
    try:
        torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            mkldnn.fp32_precision = "ieee"  # type: ignore[union-attr]
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if convolutions is not None:
            mkldnn.fp32_precision = convolutions  # type: ignore[union-attr]
