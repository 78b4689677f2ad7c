"""Layers that every executor runs, and one training step of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat
from amct_lightning.modules.fused.choice import set_execution
from amct_lightning.modules.fused.integer import reason_against
from amct_lightning.quantizers import LearnedWeightQuantizer
from amct_lightning.quantizers.functions.weight import slope_of_scale
from tests.modules.cases import LAYERS, Host, LayerCase, Width
from tests.sums import sum_error

EXECUTIONS = ("composite", "compiled", "integer")
PER_CHANNEL, PER_TENSOR = Width(channel_wise=True), Width(channel_wise=False)
LEARNED = Width(algo="ulq_retrain", channel_wise=True)
OF_CHANNEL = [
    case
    for case in LAYERS
    if case.name
    in ("conv1d", "conv", "conv_grouped", "conv_same", "conv3d", "deconv1d", "deconv", "deconv_grouped", "deconv3d")
]
LINEAR = [case for case in LAYERS if "linear" in case.name]
RECURRENT = [case for case in LAYERS if case.name in ("lstm", "gru")]
COMBINATIONS = [
    *((case, PER_CHANNEL) for case in OF_CHANNEL),
    *((case, PER_TENSOR) for case in OF_CHANNEL if case.name in ("conv", "deconv")),
    *((case, LEARNED) for case in OF_CHANNEL if case.name in ("conv", "conv3d", "deconv")),
    *((case, Width()) for case in LINEAR),
    *((case, PER_CHANNEL) for case in LINEAR),
    *((case, width) for case in LINEAR for width in (Width(algo="ulq_retrain"), LEARNED) if case.name == "linear"),
]
"""Few widths and one dtype: each is some kernels more to compile."""


def case_named(name: str) -> LayerCase:
    return next(case for case in LAYERS if case.name == name)


def calibrated(case: LayerCase, width: Width = PER_CHANNEL, execution: Any = "composite") -> Host:
    """A model of one layer, trained for a batch."""
    torch.manual_seed(0)
    host, x = case.model(), case.input()
    model = prepare_qat(host, width.config(), x, execution=execution).train()
    model(x)
    return model


def alike(model: nn.Module, executions: Sequence[Any] = EXECUTIONS) -> list[Any]:
    """Copies of a model, each run by another executor."""
    models = [copy.deepcopy(model) for _ in executions]
    for other, execution in zip(models, executions, strict=True):
        set_execution(other, execution)
    return models


@dataclass
class Step:
    """What a training step gives: the output, and gradients by name, ``"x"`` for that of the input."""

    output: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, around: Callable[[], Any] | None = None) -> Step:
        model.zero_grad()
        x = x.detach().requires_grad_()
        if around is None:
            output = model(x)
        else:
            with around():
                output = model(x)
        output.backward(gradient_of(output))
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return cls(output.detach(), {"x": x.grad, **found})  # type: ignore[dict-item]


def gradient_of(output: Tensor) -> Tensor:
    """A gradient of an output, the same for all that have its shape."""
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return torch.empty_like(output).copy_(values)


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included, in one shape, dtype and memory format."""
    kinds = left.shape == right.shape and left.dtype == right.dtype and left.stride() == right.stride()
    return kinds and torch.equal(left.nan_to_num(0.125), right.nan_to_num(0.125))


def is_factor(name: str) -> bool:
    return "_quantizer." in name


def assert_same_but_for_sums(left: Step, right: Step, bounds: dict[str, Tensor]) -> None:
    """Equal to the bit; gradients of factors, whose terms are added in another order, within the error of both sums."""
    assert same(left.output, right.output)
    assert left.gradients.keys() == right.gradients.keys()
    for name, gradient in left.gradients.items():
        other = right.gradients[name]
        if is_factor(name):
            assert ((gradient - other).abs() <= bounds[name]).all(), (name, gradient, other, bounds[name])
        else:
            assert same(gradient, other), name


def bounds(model: Host, x: Tensor) -> dict[str, Tensor]:
    """How far two sums of the terms of each factor's gradient may be apart, by the name of the factor."""
    layer: Any = copy.deepcopy(model).layer.eval()
    with torch.no_grad():
        values = layer.input_quantizer(x).float().requires_grad_()
        weight = layer.weight_quantizer(layer.weight).float().requires_grad_()
    bias = None if layer.bias is None else layer.bias.float()
    output = layer._operate(values, weight, bias, **model.call)
    output.backward(gradient_of(output))
    # A term is the gradient above or below the range, and at most half a step of it within and at the ends. The rest
    # of the factor are the roundings of the terms themselves, which are a handful, and of the few operations after.
    terms, of_x = values.grad.abs().sum(), 2 * sum_error(x.numel() + 8) * 2  # type: ignore[union-attr]
    found = {f"layer.input_quantizer.{clip}": terms * of_x for clip in ("clip_max", "clip_min")}
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, LearnedWeightQuantizer):
        layout = quantizer.layout
        scale = layout.spread(quantizer.scale.detach(), layout.view(layer.weight), quantizer.channel_wise)
        settings = layout, quantizer.num_bits, quantizer.gradient_factor
        slope = slope_of_scale((layer.weight.detach().float(), scale), settings)
        terms = (slope * layout.view(weight.grad)).abs().sum_to_size(scale.shape).flatten()
        # Rounding w/s decides about the term, not the sum, and is the same in all executors.
        found["layer.weight_quantizer.scale"] = terms * 2 * sum_error(layer.weight.numel() + 8)
    return found


def integer_or_skip(model: Host) -> None:
    reason = reason_against(model.layer, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
