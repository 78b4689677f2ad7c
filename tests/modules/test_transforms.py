"""QAT layers under ``torch.func``, with inputs that are changed in place, and in a gradient penalty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

from amct_lightning import calibrate, prepare_qat, quantized_layers
from tests.modules.cases import LAYERS, WIDTHS, Converted, Width, converted
from tests.operators import Operators

LEARNED = Width(algo="ulq_retrain")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=[case for case in LAYERS if len(case.shape) > 1], ids=lambda case: case.name)
def qat(request: pytest.FixtureRequest) -> Converted:
    return converted(request.param, LEARNED)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    twin, x = copy.deepcopy(model), x.clone().requires_grad_()
    twin.zero_grad()
    twin(x).square().sum().backward()
    return {"x": x.grad} | {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_parameters_and_the_input(qat: Converted, training: bool) -> None:
    model, x = qat.model.train(training), qat.x
    expected, before = plain_gradients(model, x), copy.deepcopy(model.state_dict())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    of_values, of_x = grad(loss, argnums=(0, 1))(parameters(model), x)
    for name, value in {"x": of_x, **of_values}.items():
        torch.testing.assert_close(value, expected[name], **CLOSE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_vjp_and_jvp_agree(qat: Converted) -> None:
    """``<v, J u> = <J^T v, u>`` for all parameters and the input together."""
    model, x = qat.model.eval(), qat.x
    values = parameters(model)
    directions = {name: torch.randn_like(value) for name, value in values.items()}, torch.randn_like(x)
    y, back = vjp(lambda values, x: functional_call(model, values, (x,)), values, x)
    _, pushed = jvp(lambda values, x: functional_call(model, values, (x,)), (values, x), directions)
    v = torch.randn_like(y)
    of_values, of_x = back(v)
    right = (of_x * directions[1]).sum() + sum((of_values[n] * directions[0][n]).sum() for n in values)
    torch.testing.assert_close((v * pushed).sum(), right, rtol=1e-4, atol=1e-4)


def test_vmap_over_the_batch(qat: Converted) -> None:
    model, x, axis = qat.model.eval(), qat.x, qat.case.batch_axis
    alone = torch.stack([model(part.unsqueeze(axis)) for part in x.unbind(axis)])
    torch.testing.assert_close(vmap(lambda part: model(part.unsqueeze(axis)), axis)(x), alone, **CLOSE)


def test_gradients_per_sample(qat: Converted) -> None:
    model, x, axis = qat.model.eval(), qat.x, qat.case.batch_axis

    def loss(values: dict[str, Tensor], part: Tensor) -> Tensor:
        return functional_call(model, values, (part.unsqueeze(axis),)).square().sum()

    each = vmap(grad(loss), in_dims=(None, axis))(parameters(model), x)
    for number, part in enumerate(x.unbind(axis)):
        expected = plain_gradients(model, part.unsqueeze(axis))
        for name, values in each.items():
            torch.testing.assert_close(values[number], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [WIDTHS[0], LEARNED], ids=str)
def test_an_ensemble_and_a_jacobian(width: Width) -> None:
    models = [converted(LAYERS[9], width).model.eval() for _ in range(3)]
    for factor, model in enumerate(models, 1):
        model.layer.weight.data.mul_(factor)
        model.layer.input_quantizer.clip_max.data.mul_(factor)
    x = torch.randn(4, 8)
    stacked = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(*stack_module_state(models))
    torch.testing.assert_close(stacked, torch.stack([model(x) for model in models]), **CLOSE)
    values = parameters(models[0])
    rows = jacrev(lambda values: functional_call(models[0], values, (x,)).sum(0))(values)
    y = models[0](x).sum(0)
    for row, value in enumerate(y):
        models[0].zero_grad()
        value.backward(retain_graph=True)
        for name, p in models[0].named_parameters():
            torch.testing.assert_close(rows[name][row], p.grad, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_still_to_be_calibrated_says_what_to_do() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(8, 1)), None, torch.randn(2, 8)).train()
    with pytest.raises(RuntimeError, match=r"not calibrated.*calibrate\(model, batches\).*model\.eval\(\)"):
        grad(lambda x: model(x).sum())(torch.randn(2, 8))
    calibrate(model, [torch.randn(9, 8)])
    assert grad(lambda x: model(x).sum())(torch.randn(2, 8)).abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The model is evaluated before")
def test_before_the_calibration_an_evaluation_is_that_of_the_float_layer() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(8, 1)), None, torch.randn(2, 8)).eval()
    found = grad(lambda x: model(x).sum())(torch.randn(2, 8))
    torch.testing.assert_close(found, model[0].weight.detach().expand(2, 8))
    for layer in quantized_layers(model).values():
        layer.quant_mode = "float"
    torch.testing.assert_close(grad(lambda x: model(x).sum())(torch.randn(2, 8)), found)


IN_PLACE = [case for case in LAYERS if case.name in ("linear", "linear_3d", "linear_1d", "lstm", "gru")]


@pytest.mark.parametrize("case", IN_PLACE, ids=lambda case: case.name)
@pytest.mark.parametrize("of_leaf", [True, False])
def test_the_input_of_a_frozen_layer_may_be_changed_in_place(case: Any, of_leaf: bool) -> None:
    qat = converted(case, LEARNED)
    for name in ("weight", "weight_ih_l0", "weight_hh_l0"):
        if hasattr(qat.layer, name):
            getattr(qat.layer, name).requires_grad_(False)
    factor = torch.ones((), requires_grad=not of_leaf)

    def gradients(in_place: bool) -> list[Tensor | None]:
        factor.grad = None
        qat.model.zero_grad()
        h = qat.x * factor
        y = qat.model(h).square().sum()
        if in_place:
            h += 1
        (y + h.sum()).backward()
        return [factor.grad, *(p.grad for p in qat.model.parameters())]

    def float_layer() -> None:
        qat.float_model.requires_grad_(False)
        h = qat.x * torch.ones((), requires_grad=True)
        y = qat.float_model(h).square().sum()
        h += 1
        (y + h.sum()).backward()

    if case.name != "lstm":  # whose kernels keep the input or not, by the device and the order of axes
        float_layer()  # works, which is why the quantized one has to
    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("case", [case for case in LAYERS if not case.recurrent], ids=lambda case: case.name)
def test_no_layer_that_is_trained_copies_its_input(case: Any) -> None:
    qat = converted(case, LEARNED)
    with Operators() as operators:
        qat.model(qat.x.clone().requires_grad_()).sum().backward()
    assert operators.counts["aten::clone"] <= 1  # that of the test


def test_nothing_is_kept_that_no_gradient_needs() -> None:
    qat = converted(LAYERS[9], LEARNED)
    kept: list[int] = []

    def sizes() -> list[int]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            qat.model(qat.x)
        return sorted(kept)

    assert qat.x.numel() in sizes()
    for quantizer in (qat.layer.input_quantizer, qat.layer.weight_quantizer):
        quantizer.requires_grad_(False)
    qat.layer.weight.requires_grad_(False)
    assert sizes() == []  # the bias is all that is trained


def test_layers_in_float_keep_no_factor_that_an_optimizer_changes() -> None:
    model = converted(LAYERS[9], LEARNED).model
    model.layer.quant_mode = "float"
    model.layer.weight.requires_grad_(False)
    y = model(torch.randn(3, 8, requires_grad=True))
    with torch.no_grad():
        model.layer.input_quantizer.clip_max.add_(0)
    y.sum().backward()
    assert torch.equal(model.layer.input_quantizer.clip_max.grad, torch.tensor(0.0))


@pytest.mark.parametrize("width", [WIDTHS[0], LEARNED], ids=str)
def test_a_gradient_penalty_names_its_remedy_which_works(width: Width) -> None:
    qat = converted(LAYERS[9], width)
    x = qat.x.clone().requires_grad_()

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(qat.model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    with pytest.raises(RuntimeError, match=r"quant_mode = 'float'.*quantized_layers\(model\).*Gradient penalties"):
        penalty().backward()
    for layer in quantized_layers(qat.model).values():
        layer.quant_mode = "float"
    qat.model.zero_grad()
    penalty().backward()
    torch.testing.assert_close(qat.layer.weight.grad, 2 * 3 * qat.layer.weight.sum(0).expand(5, 8), **CLOSE)


def test_second_gradients_are_refused_under_transforms_too() -> None:
    model = converted(LAYERS[9]).model.eval()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad(lambda x: grad(lambda x: model(x).square().sum())(x).sum())(torch.randn(3, 8))
