"""Layers on the device's grid against an int64 computation of what the contract says the device does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from amct_lightning.modules.grid.codes import activation_codes
from amct_lightning.quantizers import ActivationQuantizer
from tests.modules.cases import LAYERS, LayerCase, Width
from tests.modules.grid.conftest import (
    CLOSE,
    EXACT,
    OnGrid,
    ascend_quant,
    deployed,
    deployed_recurrent,
    factors,
)
from tests.operators import Operators


@torch.no_grad()
def test_evaluation_gives_the_bits_of_the_device(qat: OnGrid) -> None:
    y = qat.model.eval()(qat.x)
    expected = deployed_recurrent(qat, qat.x) if qat.case.recurrent else torch.from_numpy(deployed(qat, qat.x))
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_values_at_ties_are_rounded_as_the_device_rounds_them(num_bits: int) -> None:
    """Multiplying by the reciprocal falls on the other side of many ties than dividing, and the offset comes after."""
    differing = 0
    for upper, lower in ((1.7, -0.9), (2.55, -0.3), (0.123, -3.1), (5.0, -4.7)):
        quantizer = ActivationQuantizer(num_bits, clip=(upper, lower))
        scale, _ = factors(quantizer)
        ties = (np.arange(-300, 300).astype(np.float32) + np.float32(0.5)) * scale
        codes = activation_codes(quantizer, torch.from_numpy(ties), *quantizer.usable_clips()).values
        assert np.array_equal(codes.detach().numpy(), ascend_quant(ties, quantizer))
        differing += int((codes * torch.tensor(scale) != quantizer(torch.from_numpy(ties))).sum())
    assert differing > 0


@pytest.mark.parametrize("width", [Width(), Width(16, 8), Width(4, 4)], ids=str)
@torch.no_grad()
def test_sums_of_many_terms_are_exact(width: Width) -> None:
    """More terms than float32 adds exactly, all of one sign."""
    qat = OnGrid(LayerCase("wide", lambda: nn.Linear(2000, 3), (4, 2000)), width)
    qat.model.layer.weight.abs_()
    x = qat.x.abs() if width.activations < 16 else qat.x  # int32 would overflow
    torch.testing.assert_close(qat.model.eval()(x), torch.from_numpy(deployed(qat, x)), **EXACT)


def test_gradients_are_those_without_the_grid(qat8: OnGrid) -> None:
    """Exactly where nothing depends on a rounding of the output."""
    if qat8.case.recurrent:
        pytest.skip("the states of a recurrent layer depend on the products before")
    found = []
    for model in (qat8.model, qat8.plain):
        x = qat8.x.clone().requires_grad_()
        y = model(x)
        y.backward(torch.ones_like(y))
        found.append({"x": x.grad} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_gradients_in_evaluation_are_those_of_training(qat: OnGrid) -> None:
    found = []
    for training in (True, False):
        qat.model.train(training).zero_grad()
        qat.model(qat.x).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in qat.model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_training_computes_what_evaluation_computes(qat: OnGrid) -> None:
    trained = qat.model(qat.x)
    torch.testing.assert_close(qat.model.eval()(qat.x), trained, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_on_the_host(qat8: OnGrid, training: bool) -> None:
    qat8.model.train(training)
    with Operators() as operators:
        qat8.model(qat8.x).square().mean().backward()
    assert operators.counts
    assert operators.host_reads == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same(qat8: OnGrid, duplicate: Any) -> None:
    twin = duplicate(qat8.model.eval())
    torch.testing.assert_close(twin(qat8.x), qat8.model(qat8.x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_the_dtype_of_the_output_only(qat8: OnGrid, dtype: torch.dtype) -> None:
    expected = qat8.model(qat8.x)
    with torch.autocast("cpu", dtype=dtype):
        y = qat8.model(qat8.x)
    torch.testing.assert_close(y, expected.to(dtype), **EXACT)
    y.float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in qat8.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_keeps_it(qat8: OnGrid, dtype: torch.dtype) -> None:
    qat8.model.to(dtype)
    assert qat8.model(qat8.x.to(dtype)).dtype == dtype
    assert qat8.model.eval()(qat8.x.to(dtype)).dtype == dtype


def test_the_grid_adds_nothing_to_the_state(qat8: OnGrid) -> None:
    assert qat8.model.state_dict().keys() == qat8.plain.state_dict().keys()
    qat8.model.load_state_dict(qat8.float_model.state_dict())
    qat8.plain.load_state_dict(qat8.model.state_dict())


def test_derivatives_of_functional_transforms_agree(qat8: OnGrid) -> None:
    model, x = qat8.model.eval(), qat8.x
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    of_values, of_x = grad(loss, argnums=(0, 1))(values, x)
    directions = {name: torch.randn_like(value) for name, value in values.items()}, torch.randn_like(x)
    _, pushed = jvp(loss, (values, x), directions)
    pulled = (of_x * directions[1]).sum() + sum((of_values[name] * directions[0][name]).sum() for name in values)
    torch.testing.assert_close(pushed, pulled, rtol=1e-4, atol=1e-3)


@pytest.fixture
def _allow_rnn() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.usefixtures("_allow_rnn")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv", "linear", "deconv", "gru"])
def test_it_compiles_to_one_graph(name: str, training: bool) -> None:
    qat = OnGrid(next(case for case in LAYERS if case.name == name), Width(algo="ulq_retrain"))
    qat.model.train(training)
    expected = qat.model(qat.x)
    torch._dynamo.reset()
    y = torch.compile(qat.model, fullgraph=True, backend="aot_eager")(qat.x)
    torch.testing.assert_close(y, expected, **CLOSE)
