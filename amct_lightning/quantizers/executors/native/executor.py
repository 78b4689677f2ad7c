"""The compiled executor on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amct_lightning.quantizers.executors.base import Forward, Quantizers, Tensors
from amct_lightning.quantizers.executors.compiled import CompiledExecutor
from amct_lightning.quantizers.executors.factors import gradient_factor_of
from amct_lightning.quantizers.executors.native.extension import layer_operator
from amct_lightning.quantizers.functions.weight import ChannelLayout
from amct_lightning.quantizers.transforms import SECOND_GRADIENT
from amct_lightning.quantizers.weight import LearnedWeightQuantizer

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class NativeExecutor(CompiledExecutor):
    """Runs the kernels in C++, and a layer in a training step as one operator; the rest as on any device."""

    def product(
        self, quantizers: Quantizers, tensors: Tensors, geometry: tuple[int, ...], grid: tuple[bool, bool]
    ) -> Tensor | None:
        """See :meth:`Executor.product`."""
        (inputs, weights), (x, weight, bias) = quantizers, tensors
        scale, given, learns = weights.scale, weights.given_scale(), isinstance(weights, LearnedWeightQuantizer)
        if not inputs.moves or inputs.symmetric or (given is None and learns):  # of which the first call is another one
            return None
        rows, clips = scale.numel(), inputs.clips
        if not (_is_plain(x) and _has_rows(weight, weights.layout, rows) and _is_float(bias)):
            return None
        operator = layer_operator("quantized_product") if clips[0].is_cpu and scale.is_cpu else None
        if operator is None:
            return None
        output: Tensor = operator(
            *(x, weight, bias, *clips, inputs.poison),
            *(scale if learns else None, None if given is None else given.detach(), scale, gradient_factor_of(weights)),
            [inputs.num_bits, weights.num_bits, inputs.fixed_min, *grid, rows],
            *(geometry, SECOND_GRADIENT),
        )
        return output

    def with_backward(
        self, forward: Callable[[], Forward], quantizers: Quantizers, tensors: Tensors, geometry: tuple[int, ...]
    ) -> Tensor | None:
        """See :meth:`Executor.with_backward`."""
        (inputs, weights), (x, weight, bias) = quantizers, tensors
        plain = _is_plain(x) and _has_rows(weight, weights.layout, weights.scale.numel()) and _is_float(bias)
        operator = layer_operator("with_backward") if plain and inputs.clip_max.is_cpu else None
        if operator is None:
            return None
        with torch.no_grad():
            output, of_x, of_weight = forward()
            numbers = torch.stack((of_x.upper, of_x.lower, of_x.scale, of_x.offset))
            scales = of_weight.scale.flatten()
        learned = weights.scale if isinstance(weights, LearnedWeightQuantizer) else None
        done: Tensor = operator(
            *(output, numbers, scales, *tensors, *inputs.learned_clips, learned, of_weight.gradient_factor),
            [of_x.num_bits, of_weight.num_bits, inputs.fixed_min, False, False, scales.numel()],
            *(geometry, SECOND_GRADIENT),
        )
        return done


def _is_plain(x: Tensor) -> bool:
    """Tell whether the values of a tensor are there and lie one after another, in whichever order of its axes."""
    if not (x.is_cpu and x.dtype == torch.float32 and x.numel()):
        return False
    layout = _FORMATS.get(x.dim())
    return x.is_contiguous() or (layout is not None and x.is_contiguous(memory_format=layout))


def _is_float(bias: Tensor | None) -> bool:
    return bias is None or (bias.is_cpu and bias.dtype == torch.float32)


def _has_rows(weight: Tensor, layout: ChannelLayout, rows: int) -> bool:
    """Tell whether the numbers of a weight that share a scale lie one after another, and so for every scale."""
    return _is_plain(weight) and (rows == 1 or (rows == weight.shape[0] and not layout.transposed))
