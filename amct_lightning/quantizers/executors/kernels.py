"""What the compiled executor compiles: the formulas on flat tensors of any length, one function per kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amct_lightning.quantizers.functional import (
    activation_scale_offset,
    dequantize_,
    device_codes,
    half_range,
    kept_bits,
    quantize,
    repair_clips,
)
from amct_lightning.quantizers.functions.activation import activation_gradients
from amct_lightning.quantizers.functions.weight import ChannelLayout, arq_scale, gradient_of_scale

_LAYOUT = ChannelLayout()
_ELEMENTS = 4096  # of the tensors to compile with; any number of 2 and more is allowed later


@dataclass(frozen=True)
class Kernel:
    """Which kernel is meant.

    Attributes:
        name: One of :data:`KERNELS`.
        num_bits: Number of bits.
        channel_wise: Whether a weight has a scale per row.
        dtype: Dtype of the values; factors are float32.
        device: Type of the device.
    """

    name: str
    num_bits: int
    channel_wise: bool
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        scales = "-rows" if self.channel_wise else ""
        return f"{self.name}-{self.num_bits}{scales}-{str(self.dtype).removeprefix('torch.')}-{self.device}"


class KernelModule(torch.nn.Module):
    """A kernel as a module, which is what can be exported.

    Args:
        kernel: Which kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the kernel's function."""
        outputs: tuple[Tensor, ...] = KERNELS[self.kernel.name](self.kernel, *tensors)
        return outputs

    def examples(self) -> tuple[Tensor, ...]:
        """Return inputs of the right types; axes that they have may have another length."""
        kernel = self.kernel
        shape = (64, _ELEMENTS // 64) if kernel.name.endswith("weight") or kernel.name == "scale" else (_ELEMENTS,)
        values = torch.ones(shape, dtype=kernel.dtype, device=kernel.device)
        factor = partial(torch.ones, dtype=torch.float32, device=kernel.device)  # whatever the default dtype is
        numbers = [factor(()) for _ in range(4)]  # one tensor twice would stay one for good
        scale = factor((64, 1)) if kernel.channel_wise else numbers[0]
        return {
            "train": (values, *numbers),
            "train_codes": (values, *numbers),
            "codes": (values, *numbers[:2]),
            "rebuild": (values, *numbers[:2]),
            "grid_train": (values, *numbers),
            "grid_rebuild": (values, *numbers[:2]),
            "grid_weight": (values, numbers[0]),
            "gradients": (values, values.clone(), *numbers),
            "weight": (values,),
            "rebuild_weight": (values, scale),
            "scale": (values, values.clone(), scale, numbers[1]),
        }[kernel.name]


def _train(
    kernel: Kernel, x: Tensor, clip_max: Tensor, clip_min: Tensor, previous_max: Tensor, previous_min: Tensor
) -> tuple[Tensor, ...]:
    """From the clips and those of the step before to the values, what they were made with, and a number to watch."""
    factors, watched = _factors(kernel, x, clip_max, clip_min, previous_max, previous_min)
    return _values(kernel, x, *factors[2:]), *factors, watched


def _train_codes(
    kernel: Kernel, x: Tensor, clip_max: Tensor, clip_min: Tensor, previous_max: Tensor, previous_min: Tensor
) -> tuple[Tensor, ...]:
    """The same with the integers, counted from 0, in place of the values that they stand for."""
    factors, watched = _factors(kernel, x, clip_max, clip_min, previous_max, previous_min)
    return *_codes(kernel, x, *factors[2:]), *factors, watched


def _codes(kernel: Kernel, x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    codes = quantize(x.float(), scale, kernel.num_bits, offset)
    return ((codes + half_range(kernel.num_bits)).to(torch.uint8),)


def _factors(
    kernel: Kernel, x: Tensor, clip_max: Tensor, clip_min: Tensor, previous_max: Tensor, previous_min: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    upper, lower = repair_clips(clip_max, clip_min, previous_max, previous_min, fixed_min=False)
    scale, offset = activation_scale_offset(upper, lower, kernel.num_bits)
    # Inductor takes 0 times anything for 0, which it is not for NaN and infinity; so it is left to the quantizer.
    return (upper, lower, scale, offset), x.abs().amax().float() + upper.abs() + lower.abs()


def _rebuild(kernel: Kernel, x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    return (_values(kernel, x, scale, offset),)


def _grid_train(
    kernel: Kernel, x: Tensor, clip_max: Tensor, clip_min: Tensor, previous_max: Tensor, previous_min: Tensor
) -> tuple[Tensor, ...]:
    """As :func:`_train`, with the codes on the device's grid."""
    factors, watched = _factors(kernel, x, clip_max, clip_min, previous_max, previous_min)
    return *_grid_codes(kernel, x, *factors[2:]), *factors, watched


def _grid_codes(kernel: Kernel, x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    return (device_codes(x.float(), scale, kernel.num_bits, offset),)


def _grid_rebuild(kernel: Kernel, x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    return (device_codes(x.float(), scale, kernel.num_bits, offset) * scale,)


def _grid_weight(kernel: Kernel, weight: Tensor, input_scale: Tensor) -> tuple[Tensor, ...]:
    """From a weight and the scale of the input to codes, scale, the product of both scales and what is kept of it."""
    scale = arq_scale(weight.float(), _LAYOUT, kernel.num_bits, kernel.channel_wise)
    product = scale.view(-1) * input_scale
    return quantize(weight.float(), scale, kernel.num_bits), scale, product, kept_bits(product)


def _gradients(kernel: Kernel, x: Tensor, grad: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    found = activation_gradients((x, *numbers), (kernel.num_bits, torch.float32), (True, True, True), grad)
    return tuple(part for part in found if part is not None)


def _weight(kernel: Kernel, weight: Tensor) -> tuple[Tensor, ...]:
    scale = arq_scale(weight.float(), _LAYOUT, kernel.num_bits, kernel.channel_wise)
    return _weights(kernel, weight, scale), scale


def _rebuild_weight(kernel: Kernel, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (_weights(kernel, weight, scale),)


def _scale(kernel: Kernel, weight: Tensor, grad: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    return (gradient_of_scale((weight.float(), scale), (_LAYOUT, kernel.num_bits, factor), grad.float()),)


def _values(kernel: Kernel, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return dequantize_(quantize(x.float(), scale, kernel.num_bits, offset), scale, offset).to(x.dtype)


def _weights(kernel: Kernel, weight: Tensor, scale: Tensor) -> Tensor:
    return dequantize_(quantize(weight.float(), scale, kernel.num_bits), scale).to(weight.dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "train": _train,
    "train_codes": _train_codes,
    "codes": _codes,
    "rebuild": _rebuild,
    "grid_train": _grid_train,
    "grid_rebuild": _grid_rebuild,
    "grid_weight": _grid_weight,
    "gradients": _gradients,
    "weight": _weight,
    "rebuild_weight": _rebuild_weight,
    "scale": _scale,
}
"""Name -> what it computes."""
