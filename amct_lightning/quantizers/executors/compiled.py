"""The executor whose formulas were compiled: each of them is one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from amct_lightning.quantizers.activation import ActivationQuantizer
from amct_lightning.quantizers.executors.base import Executor
from amct_lightning.quantizers.executors.factors import Factors, GridWeight, WeightFactors
from amct_lightning.quantizers.executors.kernels import Kernel
from amct_lightning.quantizers.functions.weight import ChannelLayout
from amct_lightning.quantizers.weight import LearnedWeightQuantizer, WeightQuantizer

Load = Callable[[Kernel], "Callable[[list[Tensor]], Sequence[Tensor]]"]
"""What gives a kernel."""


class CompiledExecutor(Executor):
    """Runs compiled kernels on flat views, one for all layers; what they cannot take, in operators of torch.

    Integers and gradients of inputs are those of the reference, to the bit; gradients of clips and learned scales are
    sums in another order.

    Args:
        load: What gives a kernel, compiled before if need be.
    """

    name: ClassVar[str] = "compiled"

    def __init__(self, load: Load) -> None:
        self._load = load
        self._kernels: dict[tuple[str, int, bool, torch.dtype, str], Callable[[list[Tensor]], Sequence[Tensor]]] = {}
        self._zeros: dict[torch.device, Tensor] = {}

    def quantize_input(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True, observed: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """See :meth:`Executor.quantize_input`."""
        self._prepare("train", quantizer, x)
        if x.numel() < 2 or not _learns_both(quantizer):
            return super().quantize_input(quantizer, x, observe, observed)
        return self._train("train", quantizer, x)

    def input_codes(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True
    ) -> tuple[Tensor | None, Factors]:
        """See :meth:`Executor.input_codes`."""
        self._prepare("train_codes", quantizer, x)
        if x.numel() < 2:
            return super().input_codes(quantizer, x, observe)
        if _learns_both(quantizer):
            return self._train("train_codes", quantizer, x)
        _, factors = super().input_codes(quantizer, x, observe)
        flat, restore = flattened(x)
        kernel = self._get("codes", quantizer.num_bits, False, x)
        return restore(kernel([flat, factors.scale, factors.offset])[0]), factors

    def grid_input(
        self, quantizer: ActivationQuantizer, x: Tensor, observe: bool = True, observed: Tensor | None = None
    ) -> tuple[Tensor, Factors]:
        """See :meth:`Executor.grid_input`."""
        if quantizer.serving is not None:  # of which there is no kernel
            return super().grid_input(quantizer, x, observe, observed)
        self._prepare("grid_train", quantizer, x, rebuild="grid_rebuild")
        if x.numel() < 2 or not _learns_both(quantizer):
            return super().grid_input(quantizer, x, observe, observed)
        return self._train("grid_train", quantizer, x)

    def rebuild_grid_input(self, x: Tensor, factors: Factors) -> Tensor:
        """See :meth:`Executor.rebuild_grid_input`."""
        if x.numel() < 2 or factors.dtype is not None:
            return super().rebuild_grid_input(x, factors)
        return self._rebuild("grid_rebuild", x, factors)

    def _prepare(self, name: str, quantizer: ActivationQuantizer, x: Tensor, rebuild: str = "rebuild") -> None:
        """Get the kernels for the input while it is calibrated, so that training then goes on without a halt."""
        if x.numel() >= 2 and quantizer.calibrating:
            for kernel in (name, rebuild, "gradients"):
                self._get(kernel, quantizer.num_bits, False, x)

    def _train(self, name: str, quantizer: ActivationQuantizer, x: Tensor) -> tuple[Tensor, Factors]:
        flat, restore = flattened(x)
        lower = self._zero(x.device) if quantizer.fixed_min else quantizer.clip_min
        clips = quantizer.clip_max, lower, quantizer.clip_max_previous, quantizer.clip_min_previous
        kernel = self._get(name, quantizer.num_bits, False, x)
        values, upper, lower, scale, offset, watched = kernel([flat, *(clip.detach() for clip in clips)])
        quantizer.keep(upper, lower, watched)
        return restore(values), Factors(upper, lower, scale, offset, quantizer.num_bits)

    def rebuild_input(self, x: Tensor, factors: Factors) -> Tensor:
        """See :meth:`Executor.rebuild_input`."""
        return super().rebuild_input(x, factors) if x.numel() < 2 else self._rebuild("rebuild", x, factors)

    def _rebuild(self, name: str, x: Tensor, factors: Factors) -> Tensor:
        flat, restore = flattened(x)
        kernel = self._get(name, factors.num_bits, False, x)
        return restore(kernel([flat, factors.scale, factors.offset])[0])

    def input_gradients(
        self, x: Tensor, grad: Tensor, factors: Factors, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :meth:`Executor.input_gradients`."""
        if x.numel() < 2:
            return super().input_gradients(x, grad, factors, needs)
        if grad.dtype.itemsize > x.dtype.itemsize:  # the kernel would round it to the dtype of the input
            of_x, of_max, of_min = self.input_gradients(x.to(grad.dtype), grad, factors, needs)
            return None if of_x is None else of_x.to(x.dtype), of_max, of_min
        flat, restore = flattened(x)
        if grad.stride() != x.stride() or grad.dtype != x.dtype or not is_dense(x):
            grad = torch.empty_like(x).copy_(grad)
        kernel = self._get("gradients", factors.num_bits, False, x)
        found = kernel([flat, flattened(grad)[0], *factors[:4]])
        of_x, of_max, of_min = (part if need else None for part, need in zip(found, needs, strict=True))
        return None if of_x is None else restore(of_x), of_max, of_min

    def quantize_weight(self, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, WeightFactors]:
        """See :meth:`Executor.quantize_weight`."""
        found = self._weight("weight", quantizer, weight, [])
        return super().quantize_weight(quantizer, weight) if found is None else found[:2]

    def grid_weight(self, quantizer: WeightQuantizer, weight: Tensor, input_scale: Tensor) -> GridWeight:
        """See :meth:`Executor.grid_weight`."""
        found = self._weight("grid_weight", quantizer, weight, [input_scale])
        if found is None:
            return super().grid_weight(quantizer, weight, input_scale)
        codes, factors, (scale, kept) = found
        return GridWeight(codes, factors, scale, kept)

    def _weight(
        self, name: str, quantizer: WeightQuantizer, weight: Tensor, numbers: list[Tensor]
    ) -> tuple[Tensor, WeightFactors, Sequence[Tensor]] | None:
        """Return what a kernel makes of a weight, from its own scale, or ``None`` if there is no kernel for it."""
        learned = isinstance(quantizer, LearnedWeightQuantizer)
        if learned or quantizer.frozen or not _is_simple(weight, quantizer.layout):
            return None
        rows, restore = _as_rows(weight)
        values, scale, *rest = self._get(name, quantizer.num_bits, quantizer.channel_wise, weight)([rows, *numbers])
        quantizer.scale.copy_(scale.view(-1))
        shaped = scale.view(-1, *[1] * (weight.dim() - 1))
        return restore(values), WeightFactors(shaped, quantizer.layout, quantizer.num_bits, 0.0), rest

    def rebuild_weight(self, weight: Tensor, factors: WeightFactors) -> Tensor:
        """See :meth:`Executor.rebuild_weight`."""
        scale, layout, num_bits, _ = factors
        if scale.numel() == 1 and weight.numel() > 1:
            flat, restore = flattened(weight)
            kernel = self._get("rebuild", num_bits, False, weight)
            return restore(kernel([flat, scale.view(()), self._zero(weight.device)])[0])
        if not _is_simple(weight, layout):
            return super().rebuild_weight(weight, factors)
        rows, restore = _as_rows(weight)
        return restore(self._get("rebuild_weight", num_bits, True, weight)([rows, scale.view(-1, 1)])[0])

    def scale_gradient(self, weight: Tensor, grad: Tensor, factors: WeightFactors) -> Tensor:
        """See :meth:`Executor.scale_gradient`."""
        scale, layout, num_bits, factor = factors
        if grad.dtype.itemsize > weight.dtype.itemsize:  # the kernel would round it to the dtype of the weight
            weight = weight.to(grad.dtype)
        if not _is_simple(weight, layout):
            return super().scale_gradient(weight, grad, factors)
        if grad.stride() != weight.stride() or grad.dtype != weight.dtype or not is_dense(weight):
            grad = torch.empty_like(weight).copy_(grad)
        rows, grads = _as_rows(weight)[0], _as_rows(grad)[0]
        channel_wise = scale.numel() > 1
        shaped = scale.view(-1, 1) if channel_wise else scale.view(())
        number = torch.full((), factor, dtype=torch.float32, device=weight.device)
        return self._get("scale", num_bits, channel_wise, weight)([rows, grads, shaped, number])[0].view(-1)

    def _get(
        self, name: str, num_bits: int, channel_wise: bool, values: Tensor
    ) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        key = name, num_bits, channel_wise, values.dtype, values.device.type
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = self._load(Kernel(*key))
        return kernel

    def _zero(self, device: torch.device) -> Tensor:
        if device not in self._zeros:
            self._zeros[device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._zeros[device]


def _learns_both(quantizer: ActivationQuantizer) -> bool:
    """Tell whether a forward makes its range of two clips as they are, as the kernels for training do."""
    return quantizer.moves and not quantizer.symmetric


def flattened(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the values of a tensor as they lie in memory, and what gives such values the layout of the tensor.

    Args:
        x: A tensor; one with gaps or overlaps is copied, its axes in the same order.

    Example:
        >>> x = torch.arange(4.0).view(1, 2, 1, 2).to(memory_format=torch.channels_last)
        >>> flat, restore = flattened(x)
        >>> flat, torch.equal(restore(flat), x)
        (tensor([0., 2., 1., 3.]), True)
    """
    if not (x.is_contiguous() or is_dense(x)):
        x = x.clone()
    shape, strides = x.shape, x.stride()
    return x.as_strided((x.numel(),), (1,)), lambda values: values.as_strided(shape, strides)


def is_dense(x: Tensor) -> bool:
    """Tell whether a tensor covers its memory without gaps and overlaps, in any order of its axes."""
    expected = 1
    for stride, length in sorted((x.stride(axis), x.shape[axis]) for axis in range(x.dim()) if x.shape[axis] > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _is_simple(weight: Tensor, layout: ChannelLayout) -> bool:
    """Tell whether a weight is a row for each output channel in memory."""
    rows = weight.shape[0]
    if layout.transposed or layout.group_size or rows < 2 or weight.numel() < 2 * rows or not is_dense(weight):
        return False
    return weight.stride(0) * rows == weight.numel()


def _as_rows(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    flat, restore = flattened(weight)
    return flat.view(weight.shape[0], -1), lambda values: restore(values.view(-1))
