"""The kernels in C++ as functions on tensors, which take and give what those that Inductor compiles do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from amct_lightning.quantizers.executors.kernels import Kernel
from amct_lightning.quantizers.executors.native.library import Run, function

VALUES, CODES, GRID, GRID_VALUES = range(4)  # Form in activations.h


def native_kernel(kernel: Kernel) -> Callable[[list[Tensor]], Sequence[Tensor]] | None:
    """Return a kernel, or ``None`` if there is none in C++ for its device and dtype, or no compiler that works.

    Args:
        kernel: Which one.
    """
    if kernel.device != "cpu":
        return None
    name, make = _MAKERS[kernel.name]
    run = function(name, kernel.dtype)
    return None if run is None else partial(make, run, kernel)


def _train(form: int, run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    x, *clips = tensors
    out, numbers = _output(x, form), _numbers(5)
    pointers = [clip.data_ptr() for clip in clips]
    run(form, x.data_ptr(), out.data_ptr(), x.numel(), *pointers, numbers.data_ptr(), *_last(kernel))
    return out, *numbers.unbind()


def _convert(form: int, run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    x, scale, offset = tensors
    out = _output(x, form)
    run(form, x.data_ptr(), out.data_ptr(), x.numel(), scale.data_ptr(), offset.data_ptr(), *_last(kernel))
    return (out,)


def _gradients(run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    x, grad, *factors = tensors
    of_clips = _numbers(2)
    pointers = [factor.data_ptr() for factor in factors]
    memory = grad.data_ptr()  # where the gradient of the input is written as well
    run(x.data_ptr(), memory, memory, x.numel(), *pointers, of_clips.data_ptr(), *_last(kernel))
    return grad, *of_clips.unbind()


def _weight(run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    [weight] = tensors
    rows, columns = _rows(kernel, weight)
    out, scales = torch.empty_like(weight), _numbers(rows)
    run(weight.data_ptr(), rows, columns, scales.data_ptr(), out.data_ptr(), *_last(kernel))
    return out, scales.view(-1, 1)


def _grid_weight(run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    weight, input_scale = tensors
    rows, columns = _rows(kernel, weight)
    out, (scales, products, kept) = torch.empty_like(weight, dtype=torch.float32), _numbers(3, rows).unbind()
    pointers = [tensor.data_ptr() for tensor in (input_scale, scales, products, kept, out)]
    run(weight.data_ptr(), rows, columns, *pointers, *_last(kernel))
    return out, scales.view(-1, 1), products, kept


def _rebuild_weight(run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    weight, scale = tensors
    rows, columns = _rows(kernel, weight)
    out = torch.empty_like(weight)
    run(weight.data_ptr(), rows, columns, scale.data_ptr(), out.data_ptr(), *_last(kernel))
    return (out,)


def _scale(run: Run, kernel: Kernel, tensors: list[Tensor]) -> Sequence[Tensor]:
    weight, grad, scale, factor = tensors
    rows, columns = _rows(kernel, weight)
    out = _numbers(rows)
    pointers = [tensor.data_ptr() for tensor in (scale, factor, out)]
    run(weight.data_ptr(), grad.data_ptr(), rows, columns, *pointers, *_last(kernel))
    return (out,)


def _output(x: Tensor, form: int) -> Tensor:
    if form == VALUES:
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=torch.uint8 if form == CODES else torch.float32)


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _rows(kernel: Kernel, weight: Tensor) -> tuple[int, int]:
    """Return how many scales there are, and how many numbers share one."""
    rows = weight.shape[0] if kernel.channel_wise else 1
    return rows, weight.numel() // rows


def _last(kernel: Kernel) -> tuple[int, int]:
    return kernel.num_bits, torch.get_num_threads()


_MAKERS: dict[str, tuple[str, Callable[[Run, Kernel, list[Tensor]], Sequence[Tensor]]]] = {
    "train": ("train", partial(_train, VALUES)),
    "train_codes": ("train", partial(_train, CODES)),
    "grid_train": ("train", partial(_train, GRID)),
    "codes": ("convert", partial(_convert, CODES)),
    "rebuild": ("convert", partial(_convert, VALUES)),
    "grid_rebuild": ("convert", partial(_convert, GRID_VALUES)),
    "gradients": ("gradients", _gradients),
    "weight": ("weight", _weight),
    "grid_weight": ("weight_grid", _grid_weight),
    "rebuild_weight": ("weight_values", _rebuild_weight),
    "scale": ("scale_gradients", _scale),
}
"""Name of a kernel -> that of the function in C++, and what calls it."""
