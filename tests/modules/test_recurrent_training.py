"""Training of LSTM and GRU: its numbers, and what is done around it.

The numbers are compared with those of the layer under a ``torch.func`` transform, where each quantizer and operator of
the cell is differentiated on its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils.checkpoint import checkpoint

from amct_lightning.modules.recurrent import loop
from tests.modules.cases import WIDTHS, Width
from tests.modules.recurrent_net import BATCH, HIDDEN, INPUTS, KINDS, STEPS, initial, plain, trained
from tests.sums import sum_error


def in_parts(
    model: Any, inputs: tuple[Tensor, ...], grads: Callable[[Tensor], Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """The same of operators that are differentiated one after the other."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs, back = vjp(lambda values, inputs: functional_call(model, values, inputs), values, inputs)
    of_values, of_inputs = back(tuple(grads(y) for y in outputs))
    return outputs, of_values | {str(number): grad for number, grad in enumerate(of_inputs)}


def compare(model: Any, inputs: tuple[Tensor, ...], error: float) -> None:
    def grads(y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)

    (outputs, found), (there, expected) = plain(model, inputs, grads), in_parts(model, inputs, grads)
    for here, other in zip(outputs, there, strict=True):
        assert torch.equal(here, other)
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max().item() <= error * largest, name


TERMS = STEPS * BATCH * 4 * HIDDEN
"""More than in any of the sums."""


@KINDS
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_outputs_and_gradients_are_those_of_the_operators_one_by_one(kind: type[nn.RNNBase], width: Width) -> None:
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    compare(trained(kind, x, width), (x,), sum_error(TERMS))


@KINDS
@pytest.mark.parametrize("block", [1, 2 * BATCH * HIDDEN, 3 * BATCH * HIDDEN + 1])
def test_it_makes_no_difference_how_many_steps_backward_looks_at_together(
    kind: type[nn.RNNBase], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    monkeypatch.setattr(loop, "BLOCK", block)
    compare(trained(kind, x, Width(algo="ulq_retrain")), (x, *initial(kind, 1, BATCH)), sum_error(TERMS))


@KINDS
@pytest.mark.parametrize(("batched", "with_state"), [*itertools.product((True, False), repeat=2)])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_so_they_are_for_every_way_of_calling_the_layer(
    kind: type[nn.RNNBase], batched: bool, with_state: bool, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    shape = (
        (STEPS, INPUTS)
        if not batched
        else (BATCH, STEPS, INPUTS)
        if settings.get("batch_first")
        else (STEPS, BATCH, INPUTS)
    )
    x = torch.randn(shape)
    state = initial(kind, *((1, BATCH) if batched else (1,))) if with_state else ()
    compare(trained(kind, x, **settings), (x, *state), sum_error(TERMS))


@KINDS
@pytest.mark.parametrize("width", [WIDTHS[0], Width(algo="ulq_retrain")], ids=str)
def test_under_autocast_too(kind: type[nn.RNNBase], width: Width) -> None:
    """Its gradients are sums of numbers with eight bits."""
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x, width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x)[0].dtype == torch.bfloat16
        compare(model, (x, *initial(kind, 1, BATCH)), sum_error(TERMS) * 2**16)


@KINDS
def test_a_layer_in_half_precision_too(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x).bfloat16()
    compare(model, (x.bfloat16(),), sum_error(TERMS) * 2**16)


@KINDS
@pytest.mark.parametrize("used", [0, 1, -1], ids=["outputs", "hidden_state", "last_state"])
def test_a_loss_may_use_one_of_the_outputs_alone(kind: type[nn.RNNBase], used: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x)
    model(x)[used].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = model(x)
    sum(y.sum() * (number == used % len(outputs)) for number, y in enumerate(outputs)).backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())


@KINDS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(kind: type[nn.RNNBase], use_reentrant: bool) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x, Width(algo="ulq_retrain"))
    outputs, expected = plain(model, (x,), torch.ones_like)

    def checkpointed(x: Tensor) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = checkpoint(model, x, use_reentrant=use_reentrant)
        return y

    checkpointed.__dict__.update(zero_grad=model.zero_grad, named_parameters=model.named_parameters)
    again, found = plain(checkpointed, (x,), torch.ones_like)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@KINDS
def test_a_gradient_penalty_names_its_remedy(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model, x = trained(kind, x), x.requires_grad_()
    for output in range(2):
        (slope,) = torch.autograd.grad(model(x)[output].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice.*quant_mode = 'float'"):
            slope.square().sum().backward()


@KINDS
@pytest.mark.parametrize("freezes", [False, True])
def test_gradients_of_two_forwards_are_those_of_one_after_the_other(kind: type[nn.RNNBase], freezes: bool) -> None:
    """The scales are written in every forward, and by DDP those that are frozen as well."""
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x)
    quantizers = model.layer.weight_quantizer, model.layer.recurrent_weight_quantizer
    if freezes:
        model.layer.weight_quantizer.freeze(model.layer.weight_ih_l0)
        model.layer.recurrent_weight_quantizer.freeze(model.layer.weight_hh_l0)
    _, first = plain(model, (x,), torch.ones_like)
    outputs = model(x)
    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.scale.copy_(quantizer.scale.clone())
    model(x)
    model.zero_grad()
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert all(torch.equal(p.grad, first[name]) for name, p in model.named_parameters())


@KINDS
def test_outputs_may_be_changed_in_place(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x)
    _, expected = plain(model, (x,), torch.ones_like)
    model.zero_grad()
    outputs = model(x)
    torch.autograd.backward([y.add_(1) for y in outputs], [torch.ones_like(y) for y in outputs])
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


@KINDS
def test_hooks_of_the_weight_quantizers_are_called(kind: type[nn.RNNBase]) -> None:
    """Scales that are held are put back by one before they are used."""
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x, Width(algo="ulq_retrain"))
    quantizers = model.layer.weight_quantizer, model.layer.recurrent_weight_quantizer
    before = model(x)[0]
    held = [quantizer.scale.detach().clone() for quantizer in quantizers]

    def put_back(owner: nn.Module, _args: Any) -> None:
        owner.scale.data.copy_(held[quantizers.index(owner)])

    for quantizer in quantizers:
        quantizer.register_forward_pre_hook(put_back)
        quantizer.scale.data.mul_(2)
    assert torch.equal(model(x)[0], before)


@KINDS
@pytest.mark.parametrize(
    "trains", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "hidden_quantizer.clip_max"]
)
def test_one_parameter_may_be_trained_alone(kind: type[nn.RNNBase], trains: str) -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    model = trained(kind, x)
    _, expected = plain(model, (x,), torch.ones_like)
    model.requires_grad_(False)
    parameter = model.layer.get_parameter(trains).requires_grad_()
    model.zero_grad()
    outputs = model(x)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert torch.equal(parameter.grad, expected[f"layer.{trains}"])
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
