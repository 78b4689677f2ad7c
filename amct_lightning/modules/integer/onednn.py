"""Integer products on x86 CPUs, by the convolution of oneDNN for uint8 inputs and int8 weights.

A linear layer is a convolution of one point: packing its weight then takes a fifth of the time that packing it for
oneDNN's matrix product takes, and the product is as fast.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor

from amct_lightning.modules.integer.codes import CHANNELS_LAST, ToCodes, weight_codes
from amct_lightning.modules.integer.numbers import POINT, Geometry, Numbers
from amct_lightning.modules.integer.packed import PackedWeight
from amct_lightning.quantizers.functional import half_range


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Numbers, packed: PackedWeight, to_codes: ToCodes
) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32, summed up in integers.

    Args:
        x: Input of any rank, of at least one number.
        weight: Weight, ``(out, in)``.
        bias: Bias, if there is one.
        numbers: Scales, offset and numbers of bits.
        packed: Where the packed weight is kept.
        to_codes: What gives the codes of the input.
    """
    codes = to_codes(x, numbers.scale, numbers.offset, numbers.num_bits[0]).reshape(1, -1, 1, weight.shape[1])
    sums = _convolve(codes.permute(0, 3, 1, 2), weight[:, :, None, None], bias, numbers, packed, POINT)
    return sums.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: Numbers,
    packed: PackedWeight,
    geometry: Geometry,
    to_codes: ToCodes,
) -> Tensor:
    """Return the convolution of ``x`` with ``weight`` in float32, summed up in integers; two dimensions channels last.

    Args:
        x: Input with batch axis, of at least one number.
        weight: Weight, output channel first.
        bias: Bias, if there is one.
        numbers: Scales, offset and numbers of bits.
        packed: Where the packed weight is kept.
        geometry: Stride, padding, dilation and groups.
        to_codes: What gives the codes of the input.
    """
    x, geometry = _only_read(x, weight, geometry)
    codes = to_codes(x, numbers.scale, numbers.offset, numbers.num_bits[0])
    codes, geometry = _without_traps(codes, weight, numbers, geometry)
    return _convolve(codes, weight, bias, numbers, packed, geometry)


def _only_read(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Leave out the points between those that a convolution of one point reads, which then has a stride of 1."""
    if all(stride == 1 for stride in geometry.stride) or any(geometry.padding) or weight[0, 0].numel() > 1:
        return x, geometry
    read: Any = (..., *(slice(None, None, stride) for stride in geometry.stride))
    return x[read], geometry._replace(stride=(1,) * len(geometry.stride))


def _without_traps(codes: Tensor, weight: Tensor, numbers: Numbers, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return codes and geometry of the same convolution without what oneDNN computes wrong, or outside of its memory.

    These are padding with another code than 0 or of three dimensions, outputs that read padding only, and strides along
    an axis with one output. Such axes are padded here, cut to what is read, and have no stride if there is one output.
    """
    by_onednn = numbers.begins_at_zero and codes.dim() < 5
    stride, padding = list(geometry.stride), list(geometry.padding)
    padded, lengths = [0] * len(stride), list(codes.shape[2:])
    for axis, (pad, step) in enumerate(zip(geometry.padding, geometry.stride, strict=True)):
        span = geometry.dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        outputs = (codes.shape[axis + 2] + 2 * pad - span) // step + 1
        if (pad and not by_onednn) or pad >= span or (outputs == 1 and step > 1):
            padded[axis], padding[axis], lengths[axis] = pad, 0, (outputs - 1) * step + span
            stride[axis] = 1 if outputs == 1 else step
    if any(padded):
        codes = _padded(codes, padded, _zero_point(numbers))
    for axis, length in enumerate(lengths, 2):
        codes = codes.narrow(axis, 0, min(length, codes.shape[axis]))
    return codes, geometry._replace(stride=tuple(stride), padding=tuple(padding))


def _padded(codes: Tensor, padding: list[int], zero_point: Tensor) -> Tensor:
    """Return the codes between as many zeros at either end of each axis; the channels last."""
    lengths = (length + 2 * pad for length, pad in zip(codes.shape[2:], padding, strict=True))
    layout = CHANNELS_LAST.get(codes.dim(), torch.contiguous_format)
    around = torch.empty((*codes.shape[:2], *lengths), dtype=codes.dtype, memory_format=layout).fill_(zero_point)
    within = around
    for axis, pad in enumerate(padding, 2):
        within = within.narrow(axis, pad, codes.shape[axis])
    within.copy_(codes)
    return around


def _zero_point(numbers: Numbers) -> Tensor:
    """Return the code that stands for 0, 0-d float32."""
    # A clip that is NaN has no offset; the scale still makes the output NaN, and the quantizer's flag tells of it.
    return numbers.offset.nan_to_num(0.0) + half_range(numbers.num_bits[0])


def _convolve(
    codes: Tensor, weight: Tensor, bias: Tensor | None, numbers: Numbers, packed: PackedWeight, geometry: Geometry
) -> Tensor:
    of_weight = weight_codes(weight, numbers.weight_scale, numbers.num_bits[1])
    ready = packed.of(of_weight, geometry, lambda: _pack(of_weight, codes, geometry))
    return _product(codes, ready, bias, (numbers.scale, _zero_point(numbers), numbers.weight_scale), geometry)


def _pack(codes: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    # Told a zero point of 0, always: the first call for a shape decides how that shape is packed in this process, and
    # what has room for a zero point takes five times as long. The product adds the room if it needs it.
    scale = torch.ones((), dtype=torch.float32, device="cpu")
    arguments = stride, padding, dilation, groups, tuple(x.shape)
    packed: Tensor = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, 0, *arguments)
    return packed


def _product(
    x: Tensor, packed: Tensor, bias: Tensor | None, numbers: tuple[Tensor, Tensor, Tensor], geometry: Geometry
) -> Tensor:
    scale, zero_point, weight_scale = numbers
    symmetric = torch.zeros(weight_scale.numel(), dtype=torch.int64, device="cpu")
    bias = None if bias is None else bias.float()
    inputs = x, scale, zero_point, packed, weight_scale, symmetric, bias, *geometry
    sums: Tensor = torch.ops.onednn.qconv_pointwise.tensor(*inputs, 1.0, 0, torch.float32, "none", [], "")
    return sums


@cache
def obstacle(dims: int, num_bits: tuple[int, int]) -> str | None:
    """Say why this CPU or this build of torch has no such convolution, or ``None`` if it has.

    Args:
        dims: Its dimensions.
        num_bits: Numbers of bits of input and weight.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"there are no integer kernels for CPUs of the kind {platform.machine()}"
    try:
        exact = _is_exact(dims, num_bits)
    except (AttributeError, RuntimeError, NotImplementedError):
        return "this build of torch has no integer convolution for CPUs"
    if not exact:
        return "this CPU has no VNNI instructions: its sums of 8-bit products saturate at 16 bits"
    return None


def _is_exact(dims: int, num_bits: tuple[int, int]) -> bool:
    """Tell whether the largest codes give the sums that they have, in convolutions with and without groups."""
    highest, lowest = 2 ** num_bits[0] - 1, -half_range(num_bits[1])
    one, zero = (torch.full((1,), value, dtype=torch.float32, device="cpu") for value in (1.0, 0.0))
    for channels, groups in ((64, 1), (64, 2), (64, 64)):
        sides = (3,) * dims
        x = torch.full((1, channels, *sides), highest, dtype=torch.uint8, device="cpu")
        weight = torch.full((channels, channels // groups, *sides), lowest, dtype=torch.int8, device="cpu")
        geometry = Geometry((1,) * dims, (0,) * dims, (1,) * dims, groups)
        sums = _product(x, _pack(weight, x, geometry), None, (one, zero, one), geometry)
        if not bool((sums == highest * lowest * weight[0].numel()).all()):
            return False
    return True
