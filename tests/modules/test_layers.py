"""One list of requirements that every QAT layer type meets at every width."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from amct_lightning import prepare_qat
from amct_lightning.modules import activation_quantizers, learned_factors
from amct_lightning.quantizers import Quantizer
from tests.modules import reference
from tests.modules.cases import COMBINATIONS, LAYERS, Converted, LayerCase, Width, converted
from tests.operators import Operators

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""For what sums in another order but rounds to the same grid."""


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=COMBINATIONS, ids=lambda combination: f"{combination[0].name}-{combination[1]}")
def qat(request: pytest.FixtureRequest) -> Converted:
    return converted(*request.param)


@pytest.fixture(params=LAYERS, ids=lambda case: case.name)
def qat8(request: pytest.FixtureRequest) -> Converted:
    return converted(request.param)


class Twin:
    """The reference with the clips of a converted layer, after the same forward and backward."""

    def __init__(self, qat: Converted) -> None:
        self.layer: Any = copy.deepcopy(qat.float_model).layer
        self.x = qat.x.clone().requires_grad_()
        names = qat.layer.weight_quantizers
        bits, channel_wise = qat.width.weights, qat.layer.weight_quantizer.channel_wise
        self.quantized = {
            name: reference.WeightQuantization(
                self.layer, getattr(self.layer, parameter), bits, channel_wise, qat.width.learned
            )
            for name, parameter in names.items()
        }
        weights = [self.quantized[name](getattr(self.layer, parameter)) for name, parameter in names.items()]
        self.y = self._recurrent(qat, weights) if qat.case.recurrent else self._forward(qat, weights[0])
        self.grad = torch.randn(self.y.shape)
        self.y.backward(self.grad)

    def _forward(self, qat: Converted, weight: Tensor) -> Tensor:
        x = reference.quantized_activation(self.x, *clips(qat.layer.input_quantizer), qat.width.activations)
        return reference.forward(self.layer, x, weight, **qat.case.call)

    def _recurrent(self, qat: Converted, weights: list[Tensor]) -> Tensor:
        ranges = {"input": clips(qat.layer.input_quantizer), "hidden": clips(qat.layer.hidden_quantizer)}
        x = self.x if qat.case.time_first else self.x.transpose(0, 1)
        y = reference.recurrent(self.layer, x, ranges, qat.width.activations, (weights[0], weights[1]))
        return y if qat.case.time_first else y.transpose(0, 1)

    def parameter_gradients(self) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.layer.named_parameters()}
        for name, weight in self.quantized.items():
            if weight.learned:
                grads[f"{name}.scale"] = torch.stack([scale.grad for scale in weight.scales])
        return grads


def clips(quantizer: Any) -> tuple[float, float]:
    return quantizer.clip_max.item(), quantizer.clip_min.item()


def tolerance(qat: Converted) -> dict[str, float]:
    # The products of a recurrent layer are computed for all steps at once, in another order of summation.
    return CLOSE if qat.case.recurrent else EXACT


def test_the_output_follows_the_formulas(qat: Converted) -> None:
    torch.testing.assert_close(qat.model(qat.x), Twin(qat).y.detach(), **tolerance(qat))


def test_the_gradients_of_input_and_parameters_follow_the_formulas(qat: Converted) -> None:
    twin, x = Twin(qat), qat.x.clone().requires_grad_()
    qat.model(x).backward(twin.grad)
    torch.testing.assert_close(x.grad, twin.x.grad, **tolerance(qat))
    for name, expected in twin.parameter_gradients().items():
        close = CLOSE if name.endswith(".scale") else tolerance(qat)
        torch.testing.assert_close(gradients(qat.model)[f"layer.{name}"], expected, **close)


def test_a_training_step_reads_nothing_on_the_host(qat: Converted) -> None:
    with Operators() as operators:
        qat.model(qat.x).square().mean().backward()
    assert operators.counts
    assert operators.host_reads == {}


def test_calibration_reads_nothing_on_the_host(qat8: Converted) -> None:
    fresh = prepare_qat(qat8.float_model, qat8.width.config(), qat8.x).train()
    with Operators() as operators:
        fresh(qat8.x).square().mean().backward()
    assert not any(q.calibrating for q in activation_quantizers(fresh).values())
    assert operators.host_reads == {}


def test_every_factor_learns(qat: Converted) -> None:
    qat.model(qat.x).square().sum().backward()
    for factor in learned_factors(qat.model):
        assert bool(torch.isfinite(factor.grad).all())
        assert bool((factor.grad != 0).any())


def test_evaluation_computes_what_training_computes(qat: Converted) -> None:
    trained = qat.model(qat.x)
    torch.testing.assert_close(qat.model.eval()(qat.x), trained, **EXACT)


def test_the_state_dict_carries_everything_to_another_conversion(qat: Converted) -> None:
    fresh = prepare_qat(qat.case.model(), qat.width.config(), qat.x)
    fresh.load_state_dict(qat.model.state_dict())
    torch.testing.assert_close(fresh.eval()(qat.x), qat.model.eval()(qat.x), **EXACT)


def test_a_float_checkpoint_loads_strictly_and_replaces_the_weights(qat: Converted) -> None:
    other = qat.case.model()
    qat.model.load_state_dict(other.state_dict(), strict=True)
    for name, value in other.state_dict().items():
        assert torch.equal(qat.model.state_dict()[name], value)
    assert not qat.layer.input_quantizer.calibrating


def test_float_parameter_names_are_kept(qat8: Converted) -> None:
    assert set(qat8.float_model.state_dict()) <= set(qat8.model.state_dict())


def test_the_layer_is_still_an_instance_of_the_float_class(qat8: Converted) -> None:
    assert isinstance(qat8.layer, type(qat8.float_model.layer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_trains_apart(qat: Converted, duplicate: Any) -> None:
    twin = duplicate(qat.model)
    torch.testing.assert_close(twin(qat.x), qat.model(qat.x), **EXACT)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(twin.parameters(), qat.model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_changes_the_layer_but_not_the_factors(qat: Converted, dtype: torch.dtype) -> None:
    qat.model.to(dtype)
    assert qat.model(qat.x.to(dtype)).dtype == dtype
    assert {p.dtype for name, p in qat.model.named_parameters() if "quantizer" not in name} == {dtype}
    quantizers = [module for module in qat.model.modules() if isinstance(module, Quantizer)]
    state = [t for q in quantizers for t in (*q.parameters(), *q.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in state} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_with_the_factors_of_float32(qat: Converted, dtype: torch.dtype) -> None:
    before = clips(qat.layer.input_quantizer)
    with torch.autocast("cpu", dtype=dtype):
        y = qat.model(qat.x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(qat.model).values())
    assert clips(qat.layer.input_quantizer) == before
    for name, parameter in qat.layer.weight_quantizers.items():
        quantizer = getattr(qat.layer, name)
        assert torch.equal(quantizer.scale, quantizer.compute_scale(getattr(qat.layer, parameter)))


def test_differentiating_twice_is_refused_clearly(qat8: Converted) -> None:
    x = qat8.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(qat8.model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.fixture(params=[case for case in LAYERS if len(case.shape) > 1], ids=lambda case: case.name)
def batched(request: pytest.FixtureRequest) -> Converted:
    return converted(request.param)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output(batched: Converted, training: bool) -> None:
    empty = batched.x.narrow(batched.case.batch_axis, 0, 0)
    y = batched.model.train(training)(empty)
    assert y.shape == batched.model(batched.x).narrow(batched.case.batch_axis, 0, 0).shape
    assert torch.isfinite(batched.layer.input_quantizer.clip_max)


def test_the_gradients_of_an_empty_batch_are_zero(batched: Converted) -> None:
    batched.model(batched.x.narrow(batched.case.batch_axis, 0, 0)).sum().backward()
    assert all(grad.abs().max() == 0 for grad in gradients(batched.model).values())


def test_a_batch_of_one_gives_one_row_of_the_whole_batch(batched: Converted) -> None:
    axis = batched.case.batch_axis
    one = batched.model(batched.x.narrow(axis, 0, 1))
    torch.testing.assert_close(one, batched.model(batched.x).narrow(axis, 0, 1), **CLOSE)


def strided(x: Tensor) -> Iterator[Tensor]:
    """The same values in other memory layouts."""
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield wide[..., ::2]


def test_the_memory_layout_of_the_input_does_not_matter(qat8: Converted) -> None:
    expected = qat8.model(qat8.x)
    for x in strided(qat8.x):
        torch.testing.assert_close(qat8.model(x), expected)


class Eager:
    """A deep copy of a model that stays uncompiled, after the same forward and backward."""

    def __init__(self, qat: Converted) -> None:
        self.model = copy.deepcopy(qat.model)
        self.y = self.model(qat.x)
        if self.model.training:
            self.y.square().sum().backward()


@pytest.fixture
def _allow_rnn() -> Iterator[None]:
    """PyTorch refuses to compile any nn.LSTM or nn.GRU, of which the quantized layers are subclasses, without this."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


compiles = pytest.mark.usefixtures("_allow_rnn")


def compiled(qat: Converted) -> Any:
    torch._dynamo.reset()
    return torch.compile(qat.model, fullgraph=True, backend="aot_eager")


@compiles
def test_a_compiled_training_step_is_one_graph_with_the_same_results(qat8: Converted) -> None:
    eager = Eager(qat8)
    y = compiled(qat8)(qat8.x)
    y.square().sum().backward()
    torch.testing.assert_close(y, eager.y, **CLOSE)
    for name, grad in gradients(eager.model).items():
        torch.testing.assert_close(gradients(qat8.model)[name], grad, **CLOSE)


@compiles
def test_a_compiled_training_step_writes_the_repaired_clips(qat8: Converted) -> None:
    quantizer = qat8.layer.input_quantizer
    before = quantizer.clip_max.item()
    with torch.no_grad():
        quantizer.clip_max.fill_(-1.0)
    compiled(qat8)(qat8.x)
    assert quantizer.clip_max.item() == before


@compiles
def test_a_compiled_training_step_tells_of_nan(qat8: Converted) -> None:
    x = qat8.x.clone()
    x.view(-1)[0] = float("nan")
    step = compiled(qat8)
    step(qat8.x)
    assert not bool(qat8.layer.input_quantizer.nonfinite)
    step(x)
    assert bool(qat8.layer.input_quantizer.nonfinite)


@compiles
def test_a_compiled_evaluation_is_one_graph_with_the_same_results(qat8: Converted) -> None:
    qat8.model.eval()
    eager = Eager(qat8)
    torch.testing.assert_close(compiled(qat8)(qat8.x), eager.y, **CLOSE)


def test_float_evaluation_before_calibration_equals_the_float_layer() -> None:
    case, width = LAYERS[0], Width(8, 8)
    float_model, x = case.model(), case.input()
    model = prepare_qat(float_model, width.config(), x).eval()
    with pytest.warns(UserWarning, match="run in float"):
        y = model(x)
    torch.testing.assert_close(y, float_model(x), **EXACT)


def test_int4_weights_that_cannot_be_packed_become_int8_with_a_warning() -> None:
    case: LayerCase = next(case for case in LAYERS if not case.int4)
    with pytest.warns(UserWarning, match=r"'layer' \(groups=2\)"):
        model = prepare_qat(case.model(), Width(8, 4).config(), case.input())
    assert model.layer.weight_quantizer.num_bits == 8
