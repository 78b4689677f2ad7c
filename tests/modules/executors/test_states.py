"""What a training does with layers between two steps, under every executor."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat
from amct_lightning.modules.fused.choice import execution_of, set_execution
from amct_lightning.modules.fused.integer import PACKED
from amct_lightning.modules.integer.codes import unsigned_codes
from amct_lightning.quantizers.executors import COMPOSITE, choice, executor_for
from tests.modules.cases import Host, LayerCase, Width
from tests.modules.executors.cases import (
    COMBINATIONS,
    EXECUTIONS,
    PER_CHANNEL,
    Step,
    alike,
    calibrated,
    case_named,
    gradient_of,
    integer_or_skip,
    is_factor,
    same,
)
from tests.sums import sum_error

executions = pytest.mark.parametrize("execution", EXECUTIONS)
names = pytest.mark.parametrize("name", ["conv", "linear"])


def width(name: str) -> Width:
    return Width() if name == "linear" else PER_CHANNEL


def made(name: str, execution: Any) -> tuple[Any, Tensor]:
    case = case_named(name)
    return calibrated(case, width(name), execution), case.input()


class TestIntegers:
    """The integer executor against the reference."""

    @pytest.mark.parametrize(("case", "width"), COMBINATIONS, ids=lambda p: getattr(p, "name", None) or str(p))
    def test_the_output_is_that_of_the_reference_but_for_the_roundings_of_sums(
        self, case: LayerCase, width: Width
    ) -> None:
        composite, integer = alike(calibrated(case, width), ("composite", "integer"))
        x = case.input() * 1.5
        steps = [Step.of(model, x) for model in (composite, integer)]
        layer = copy.deepcopy(composite).layer.eval()
        with torch.no_grad():
            values, weight = layer.input_quantizer(x).abs(), layer.weight_quantizer(layer.weight).abs()
            bias = None if layer.bias is None else layer.bias.abs()
            terms = layer._operate(values, weight, bias, **composite.call)
        # The float sum has two rounded factors in each term and rounds each addition; the other one rounds thrice.
        allowed = terms * sum_error(weight.numel() // min(weight.shape[:2]) + 8)
        assert ((steps[0].output - steps[1].output).abs() <= allowed).all()
        # Backward is that of the reference, from the same values.
        for key, gradient in steps[0].gradients.items():
            if not is_factor(key):
                assert same(gradient, steps[1].gradients[key]), key
        states = composite.state_dict(), integer.state_dict()
        assert all(same(states[0][key], states[1][key]) for key in states[0])

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:1]])
    def test_codes_are_those_of_the_reference(self, view: Any, training: bool) -> None:
        model, x = made("conv", "composite")
        x = view(x * 2)
        quantizer = model.train(training).layer.input_quantizer
        with torch.no_grad():
            found, factors = executor_for("compiled", "cpu").input_codes(quantizer, x)
            _, expected = COMPOSITE.input_codes(quantizer, x)
        assert found is not None and found.dtype == torch.uint8
        assert same(found, unsigned_codes(x, expected.scale, expected.offset, 8))
        assert [torch.equal(mine, other) for mine, other in zip(factors[:4], expected[:4], strict=True)] == [True] * 4

    @names
    def test_autocast_rounds_the_sums_and_nothing_else(self, name: str) -> None:
        case = case_named(name)
        composite, integer = alike(calibrated(case, width(name)), ("composite", "integer"))
        x = case.input()
        steps = [Step.of(m, x, lambda: torch.autocast("cpu", torch.bfloat16)) for m in (composite, integer)]
        assert steps[1].output.dtype == torch.bfloat16
        # Scales, weights and outputs of 8 bits in one, outputs only in the other.
        torch.testing.assert_close(steps[0].output, steps[1].output, rtol=2**-6, atol=2**-6)
        for key in ("x", "layer.weight", "layer.bias"):
            assert same(steps[0].gradients[key], steps[1].gradients[key])

    @pytest.mark.parametrize("name", ["conv", "linear_3d"])
    @pytest.mark.parametrize("part", [lambda x: x[:0], lambda x: x[0], lambda x: x[:1]], ids=["none", "bare", "one"])
    def test_any_number_of_samples(self, name: str, part: Any) -> None:
        case = case_named(name)
        width = Width() if name == "linear_3d" else PER_CHANNEL
        steps = [Step.of(m, part(case.input() * 0 + 0.3)) for m in alike(calibrated(case, width))]
        for step in steps[1:]:
            torch.testing.assert_close(steps[0].output, step.output, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(steps[0].gradients["x"], step.gradients["x"], rtol=0, atol=0)

    def test_evaluation_is_the_same_arithmetic(self) -> None:
        model, x = made("conv", "integer")
        integer_or_skip(model)
        trained = model(x).detach()
        with torch.inference_mode():
            assert same(model.eval()(x).clone(), trained)

    def test_a_weight_written_past_its_version_counter_is_seen(self) -> None:
        model, x = made("linear", "integer")
        before = model(x).detach()
        model.layer.weight.data.neg_()
        composite = copy.deepcopy(model)
        set_execution(composite, "composite")
        after = model(x).detach()
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, composite(x).detach(), rtol=1e-5, atol=1e-5)


@executions
@names
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [False, True])
def test_nan_and_infinity_raise_the_flag_in_training(name: str, bad: float, training: bool, execution: str) -> None:
    model, x = made(name, execution)
    quantizer = model.train(training).layer.input_quantizer
    model(x)
    assert quantizer.poison.item() == 0
    x.view(-1)[-1] = bad
    model(x)
    assert math.isnan(quantizer.poison.item()) == training
    model(torch.ones_like(x))
    assert math.isnan(quantizer.poison.item()) == training  # it stays until it is read


@executions
@pytest.mark.parametrize("clip", ["clip_max", "clip_min"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_clip_that_is_nan_raises_the_flag(clip: str, bad: float, execution: str) -> None:
    model, x = made("linear", execution)
    with torch.no_grad():  # an infinite clip on the wrong side of 0 is repaired
        getattr(model.layer.input_quantizer, clip).fill_(bad if clip == "clip_max" else -bad)
    model(x)
    assert math.isnan(model.layer.input_quantizer.poison.item())


@pytest.mark.parametrize("fixed_min", [False, True])
@pytest.mark.parametrize(
    ("upper", "lower"),
    [(-1.0, -2.0), (1.0, 0.5), (0.3, 0.3), (-1.0, 1.0), (0.0, 0.0), (2.0, -0.5), (1e-8, -1e-8), (0.0, -1.0)],
)
def test_unusable_clips_are_repaired_alike(upper: float, lower: float, fixed_min: bool) -> None:
    base, x = made("linear", "composite")
    base.layer.input_quantizer.fixed_min = fixed_min
    models = alike(base)
    for _ in range(2):
        for model in models:
            with torch.no_grad():
                model.layer.input_quantizer.clip_max.fill_(upper)
                model.layer.input_quantizer.clip_min.fill_(lower)
        steps = [Step.of(model, x) for model in models]
        states = [model.layer.input_quantizer.state_dict() for model in models]
        for step, state in zip(steps[1:], states[1:], strict=True):
            assert all(same(value, state[key]) for key, value in states[0].items())
            torch.testing.assert_close(steps[0].output, step.output, rtol=1e-5, atol=1e-5)
            assert same(steps[0].gradients["x"], step.gradients["x"])
            assert torch.allclose(
                steps[0].gradients["layer.input_quantizer.clip_min"],
                step.gradients["layer.input_quantizer.clip_min"],
                rtol=1e-5,
                atol=1e-5,
            )


class Branches(nn.Module):
    """Layers that a step may skip, call twice or call in another order; two of them share the quantizer of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.route = "abb"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        for name in self.route:
            y = getattr(self, name)(y) if name == "b" else y + self.a(torch.relu(x))
        return self.c(y)


def assert_close(left: Step, right: Step, exact: bool) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(left.output, right.output, **tolerance)
    assert left.gradients.keys() == right.gradients.keys()
    for key, gradient in left.gradients.items():
        close = {"rtol": 1e-4, "atol": 1e-4} if is_factor(key) else tolerance
        torch.testing.assert_close(gradient, right.gradients[key], **close)


def test_layers_may_be_skipped_called_twice_and_in_any_order() -> None:
    torch.manual_seed(0)
    base = prepare_qat(Branches(), None, torch.randn(4, 8), allow_reuse=True, execution="composite").train()
    base(torch.randn(4, 8))
    models: list[Any] = alike(base, ("composite", "compiled"))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    for route in ("abb", "b", "", "bab", "abb"):
        for model in models:
            model.route = route
        x = torch.randn(4, 8)
        with torch.no_grad():
            assert same(*(model(x * 3) for model in models))  # a look between two steps changes no step
        assert_close(*(Step.of(model, x) for model in models), exact=True)
        for optimizer in optimizers:
            optimizer.step()


@executions
@names
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_weight_that_changes_before_backward_is_an_error(name: str, needs_grad: bool, execution: str) -> None:
    model, x = made(name, execution)
    output = model(x.requires_grad_(needs_grad))
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        output.sum().backward()


@executions
@names
def test_an_input_that_changes_before_backward_is_an_error(name: str, execution: str) -> None:
    model, x = made(name, execution)
    output = model(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@executions
@names
def test_clips_that_change_before_backward_do_not_matter(name: str, execution: str) -> None:
    """An optimizer of their own may step in between, as those of a GAN do; learned scales are kept as weights are."""
    case = case_named(name)
    model = calibrated(case, Width(algo="ulq_retrain"), execution)
    x, other = case.input(), copy.deepcopy(model)
    expected = Step.of(other, x)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("clip_max", "clip_min")):
                parameter.mul_(0.5)
    output.backward(gradient_of(output))
    assert same(leaf.grad, expected.gradients["x"])
    for key, parameter in model.named_parameters():
        assert same(parameter.grad, expected.gradients[key]), key


@executions
@names
def test_backward_twice_adds_the_same_gradients(name: str, execution: str) -> None:
    model, x = made(name, execution)
    once = Step.of(model, x)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.backward(gradient_of(output), retain_graph=True)
    output.backward(gradient_of(output))
    assert same(leaf.grad, once.gradients["x"] * 2)
    for key, parameter in model.named_parameters():
        assert same(parameter.grad, once.gradients[key] * 2)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


@executions
def test_two_forwards_before_one_backward(execution: str) -> None:
    """Micro-batches, a loss over pairs: each forward is differentiated with the clips it ran with."""
    model, x = made("conv", execution)
    parts = [Step.of(copy.deepcopy(model), x), Step.of(copy.deepcopy(model), x * 0.5)]
    outputs = [model(x), model(x * 0.5)]
    torch.autograd.backward(outputs, [gradient_of(output) for output in outputs])
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, parts[0].gradients[key] + parts[1].gradients[key], rtol=1e-5, atol=1e-5
        )


@executions
@pytest.mark.parametrize("name", ["conv", "linear", "deconv", "lstm"])
def test_copies_and_states_hold_nothing_more(name: str, execution: str) -> None:
    model, x = made(name, execution)
    reference = calibrated(case_named(name), width(name), "composite")
    step = Step.of(model, x)
    assert model.state_dict().keys() == reference.state_dict().keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert PACKED not in twin.state_dict()
        packed = twin.layer.__dict__.get(PACKED)
        assert packed is None or packed._kept is None
        assert execution_of(twin) == execution
        again = Step.of(twin, x)
        assert same(again.output, step.output)
        assert all(same(gradient, again.gradients[key]) for key, gradient in step.gradients.items())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    reference.load_state_dict(torch.load(buffer, weights_only=True))
    set_execution(reference, execution)
    assert same(Step.of(reference, x).output, step.output)


@executions
def test_a_hook_on_a_quantizer_sees_its_values(execution: str) -> None:
    model, x = made("linear", execution)
    seen: list[Tensor] = []
    model.layer.input_quantizer.register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    output = model(x)
    assert len(seen) == 1
    assert bool(torch.isfinite(output).all())


@executions
def test_a_layer_that_is_reverted_forgets_what_ran_it(execution: str) -> None:
    model, x = made("conv", execution)
    model(x)
    model.layer.revert()
    assert not {"execution", PACKED} & model.layer.__dict__.keys()
    host = Host(copy.deepcopy(model.layer), {})
    assert same(host(x).detach(), model(x).detach())


@executions
@names
def test_the_output_may_be_changed_in_place(name: str, execution: str) -> None:
    model, x = made(name, execution)
    output = model(x.clone().requires_grad_())
    output += 1
    output[0] = 0
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@executions
@names
def test_a_second_gradient_is_refused(name: str, execution: str) -> None:
    model, x = made(name, execution)
    (grad,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="refuses to differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("execution", ["composite", "compiled"])
def test_double_precision_as_the_default_dtype_leaves_factors_in_single(execution: str) -> None:
    """As under Lightning's ``precision="64-true"``, in which kernels may be compiled that later runs load."""
    case = case_named("conv")
    model, x = calibrated(case, PER_CHANNEL, execution).double(), case.input().double()
    expected = Step.of(copy.deepcopy(model), x)
    executor_for.cache_clear()
    choice._kernel.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        step = Step.of(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(step.output, expected.output)
    assert all(same(gradient, expected.gradients[name]) for name, gradient in step.gradients.items())
