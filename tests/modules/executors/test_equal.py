"""The compiled executor gives what the reference gives, to the bit; only sums over factors have another order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, prepare_qat
from amct_lightning.modules.fused.choice import set_execution
from tests.modules.cases import LayerCase, Width
from tests.modules.executors.cases import (
    COMBINATIONS,
    LEARNED,
    PER_CHANNEL,
    RECURRENT,
    Step,
    alike,
    assert_same_but_for_sums,
    bounds,
    calibrated,
    case_named,
    same,
)

BOTH = ("composite", "compiled")
LAST = torch.channels_last


def pair(case: LayerCase, width: Width = PER_CHANNEL) -> list[Any]:
    return alike(calibrated(case, width), BOTH)


def assert_equal(models: list[Any], x: Tensor, around: Callable[[], Any] | None = None) -> None:
    """Two steps, so that the first one's effect on the books counts as well."""
    for number in range(2):
        limits = bounds(models[0], x)
        steps = [Step.of(model, x * (1 + number), around) for model in models]
        limits = {name: limit * (1 + number) for name, limit in limits.items()}
        assert_same_but_for_sums(*steps, limits)
        assert_books(*models)


def assert_books(left: nn.Module, right: nn.Module) -> None:
    """Clips, scales, calibration and flags are the same."""
    states = left.state_dict(), right.state_dict()
    assert all(same(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("case", "width"), COMBINATIONS, ids=lambda part: getattr(part, "name", None) or str(part))
def test_a_step_is_the_same(case: LayerCase, width: Width) -> None:
    assert_equal(pair(case, width), case.input() * 1.5)


@pytest.mark.parametrize("case", RECURRENT, ids=lambda case: case.name)
def test_recurrent_layers_do_without(case: LayerCase) -> None:
    model, x = calibrated(case, Width()), case.input()
    steps = [Step.of(other, x) for other in alike(model)]
    for other in steps[1:]:
        assert same(steps[0].output, other.output)
        assert all(same(gradient, other.gradients[name]) for name, gradient in steps[0].gradients.items())


@pytest.mark.parametrize("case", [case_named("conv"), case_named("deconv")], ids=lambda case: case.name)
@pytest.mark.parametrize("width", [PER_CHANNEL, LEARNED], ids=str)
@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=LAST),
        lambda x: x.transpose(2, 3),
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        lambda x: x.repeat(2, 1, 1, 1)[::2],
        lambda x: x.repeat(1, 2, 1, 1).to(memory_format=LAST)[:, 1:5],
        lambda x: x.to(memory_format=LAST)[:1],
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[:1],
        lambda x: x[:0],
        lambda x: x[0],
        lambda x: x[0].transpose(1, 2),
    ],
    ids=[
        "channels_last",
        "transposed",
        "gaps",
        "every_other",
        "part_of_last",
        "one_last",
        "expanded",
        "one",
        "empty",
        "no_batch",
        "no_batch_t",
    ],
)
def test_any_layout_of_the_input(case: LayerCase, width: Width, weights: str, view: Any) -> None:
    model = calibrated(case, width)
    if weights == "channels_last":
        model = model.to(memory_format=LAST)
    models = alike(model, BOTH)
    x = view(case.input())
    for index in range(2):
        # The layout of the input is part of the case: a leaf of the same strides.
        leaves = [x.detach().requires_grad_() for _ in models]
        limits = bounds(models[0], x)
        outputs = [other(leaf) for other, leaf in zip(models, leaves, strict=True)]
        gradient = torch.empty_like(outputs[0]).copy_(torch.randn(outputs[0].shape))
        if index:  # a gradient in another layout than the output
            gradient = gradient.transpose(-1, -2).contiguous().transpose(-1, -2)
        for output in outputs:
            output.backward(gradient)
        assert same(*(output.detach() for output in outputs))
        assert same(*(leaf.grad for leaf in leaves))
        assert same(*(other.layer.weight.grad for other in models))
        assert_books(*models)
        factor = 1 + gradient.abs().sum()
        for name, limit in limits.items():
            grads = [dict(other.named_parameters())[name].grad for other in models]
            assert ((grads[0] - grads[1]).abs() <= limit * 10 * factor).all()
        for other in models:
            other.zero_grad()


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(1, 1), (1, 1)), (nn.Linear(1, 1), (1,))])
def test_one_number(layer: nn.Module, shape: tuple[int, ...]) -> None:
    case = LayerCase("one", lambda: copy.deepcopy(layer), shape)
    assert_equal(pair(case, Width()), torch.tensor(0.3).view(shape))


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(1, 1, 1), (1, 1, 1, 1)), (nn.Conv2d(1, 3, 1), (1, 1, 1, 1))])
def test_one_point(layer: nn.Module, shape: tuple[int, ...]) -> None:
    case = LayerCase("one", lambda: copy.deepcopy(layer), shape)
    for width in (PER_CHANNEL, LEARNED):
        assert_equal(pair(case, width), torch.tensor(0.3).view(shape))


def test_one_channel_that_is_said_to_be_last() -> None:
    """Its memory is that of one channel first; the strides tell which one the next layer goes by."""
    case = LayerCase("one", lambda: nn.Conv2d(1, 4, 3), (2, 1, 5, 5))
    x = torch.randn(2, 5, 5, 1).permute(0, 3, 1, 2)
    assert x.is_contiguous()
    steps = [Step.of(model, x) for model in pair(case)]
    assert same(steps[0].output, steps[1].output)
    assert torch.equal(steps[0].gradients["x"], steps[1].gradients["x"])


def test_an_empty_batch_of_a_linear_layer() -> None:
    models = pair(case_named("linear_3d"), Width())
    steps = [Step.of(model, torch.empty(0, 3, 8)) for model in models]
    assert all(same(steps[0].gradients[name], gradient) for name, gradient in steps[1].gradients.items())
    assert_books(*models)


@pytest.mark.parametrize("name", ["conv", "linear", "deconv"])
def test_autocast(name: str) -> None:
    case = case_named(name)
    width = Width() if name == "linear" else PER_CHANNEL
    models = pair(case, width)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    x = case.input()
    steps = [Step.of(model, x, autocast) for model in models]
    assert steps[0].output.dtype == torch.bfloat16
    assert same(steps[0].output, steps[1].output)
    assert same(steps[0].gradients["x"], steps[1].gradients["x"])
    assert same(steps[0].gradients["layer.weight"], steps[1].gradients["layer.weight"])
    for clip in ("clip_max", "clip_min"):
        gradients = [step.gradients[f"layer.input_quantizer.{clip}"] for step in steps]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_model_in_bfloat16() -> None:
    case = case_named("conv")
    model = calibrated(case).to(torch.bfloat16)
    models, x = alike(model, BOTH), case.input().bfloat16()
    steps = [Step.of(other, x) for other in models]
    assert same(steps[0].output, steps[1].output)
    for name in ("x", "layer.weight", "layer.bias"):
        assert steps[0].gradients[name].dtype == torch.bfloat16
        assert same(steps[0].gradients[name], steps[1].gradients[name])
    assert_books(*models)


@pytest.mark.parametrize("case", [case_named("conv"), case_named("linear")], ids=lambda case: case.name)
@pytest.mark.parametrize("learned", [False, True])
def test_frozen_factors(case: LayerCase, learned: bool) -> None:
    models = pair(case, Width(algo="ulq_retrain" if learned else "arq_retrain"))
    for model in models:
        model.layer.input_quantizer.freeze()
        model.layer.weight_quantizer.freeze(model.layer.weight)
        with torch.no_grad():
            model.layer.weight.mul_(1.3)  # by which kept scales saturate
            model.layer.input_quantizer.clip_max.fill_(0.01)  # which does not count
    assert_equal(models, case.input())


@pytest.mark.parametrize(
    ("case", "width"),
    [(case_named("conv"), PER_CHANNEL), (case_named("conv_same"), LEARNED), (case_named("linear"), Width())],
    ids=lambda part: getattr(part, "name", None) or str(part),
)
def test_while_it_calibrates(case: LayerCase, width: Width) -> None:
    torch.manual_seed(0)
    host, x, config = case.model(), case.input(), width.config()
    config.batch_num = 3
    models = [prepare_qat(host, config, x, execution=execution).train() for execution in BOTH]
    for _ in range(4):
        x = case.input()
        steps = [Step.of(model, x) for model in models]
        assert same(steps[0].output, steps[1].output)
        assert same(steps[0].gradients["layer.weight"], steps[1].gradients["layer.weight"])
        assert_books(*models)
    assert not models[1].layer.input_quantizer.calibrating


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_and_in_evaluation(around: Any, training: bool) -> None:
    case = case_named("conv")
    models = [model.train(training) for model in pair(case)]
    x = case.input()
    with around():
        outputs = [model(x) for model in models]
    assert same(*(output.detach().clone() for output in outputs))
    assert outputs[1].requires_grad == (around is torch.enable_grad)
    assert_books(*models)
    assert_equal([model.train() for model in models], x)  # nothing was left that a training step cannot take


def test_the_first_call_of_a_process_may_be_in_inference_mode() -> None:
    """What an executor keeps for all calls is no tensor of inference mode, which autograd refuses."""
    from amct_lightning.quantizers.executors.choice import executor_for

    executor_for.cache_clear()
    case = case_named("linear")
    model = calibrated(case, Width(), "composite")
    set_execution(model, "compiled")
    with torch.inference_mode():
        model(case.input())
    assert bool(torch.isfinite(Step.of(model, case.input()).gradients["x"]).all())


def test_inputs_that_need_no_gradient_and_weights_that_do_not() -> None:
    for name in ("conv", "linear"):
        case = case_named(name)
        for frozen in ("weight", "bias", "both", "none"):
            models = pair(case, Width() if name == "linear" else PER_CHANNEL)
            for model in models:
                model.layer.weight.requires_grad_(frozen not in ("weight", "both"))
                model.layer.bias.requires_grad_(frozen not in ("bias", "both"))
            x = case.input()
            for model in models:
                model(x).square().sum().backward()
            parameters = [dict(model.named_parameters()) for model in models]
            for key, parameter in parameters[0].items():
                other = parameters[1][key].grad
                assert (parameter.grad is None) == (other is None)
                if parameter.grad is not None:
                    torch.testing.assert_close(parameter.grad, other, rtol=1e-5, atol=1e-5)


def test_wide_activations_and_narrow_weights_of_a_net() -> None:
    """Many layers on one set of kernels: lengths and formats of one do not stick to the next."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(1), nn.Linear(8 * 36, 5), nn.Linear(5, 1)
    )
    config: Any = RetrainConfig.default(net, torch.randn(1, 3, 8, 8))
    models = [prepare_qat(net, config, torch.randn(1, 3, 8, 8), execution=execution).train() for execution in BOTH]
    for batch in (4, 1, 7, 2):
        x = torch.randn(batch, 3, 8, 8)
        steps = [Step.of(model, x) for model in models]
        assert same(steps[0].output, steps[1].output)
        for name, gradient in steps[0].gradients.items():
            if "_quantizer." not in name:
                assert same(gradient, steps[1].gradients[name])
