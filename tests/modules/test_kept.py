"""Evaluation quantizes weights once while they stay, and never with what they were before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

from amct_lightning import RetrainConfig, prepare_qat
from amct_lightning.modules.fused.choice import set_execution
from amct_lightning.quantizers import WeightQuantizer
from tests.modules.cases import Width
from tests.operators import Operators

Model = nn.Sequential
Write = Callable[[Model], object]
QUANTIZING = ("aten::abs", "aten::amax", "aten::aminmax", "aten::where", "aten::lt", "aten::rsqrt")
"""Operators of the factors of weights and activations, and of folding."""


def float_model() -> Model:
    return Model(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(64, 3))


def evaluated(algo: str = "arq_retrain", grid: bool = False, execution: str = "composite") -> tuple[Model, Tensor]:
    """Return a calibrated model that was evaluated twice, and a batch."""
    torch.manual_seed(0)
    x, net = torch.randn(2, 2, 6, 6), float_model()
    layers = {name: Width(algo=algo).config(name).layers[name] for name in ("0", "3")}
    model = prepare_qat(net, RetrainConfig(layers=layers), x, deploy_grid=grid, execution=execution).train()
    for _ in range(2):
        model(x)
    model.eval()
    with torch.no_grad():
        model(x), model(x)
    assert "kept" in vars(model[0].weight_quantizer)
    return model, x


def on_flat_memory(model: Model) -> Tensor:
    """Move all parameters into one tensor, as fused optimizers do."""
    flat = parameters_to_vector(model.parameters()).detach().clone()
    vector_to_parameters(flat, model.parameters())
    return flat


def weight_of(model: Model) -> nn.Parameter:
    return model[0].weight


def _replace_data(model: Model) -> None:
    weight_of(model).data = weight_of(model).data * 1.5


def _replace_parameter(model: Model) -> None:
    model[0].weight = nn.Parameter(weight_of(model).detach() * 1.5)


def _write_bytes(model: Model) -> None:
    weight_of(model).untyped_storage().copy_((weight_of(model).detach() * 1.5).untyped_storage())


def _step(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(2, 2, 6, 6)).square().sum().backward()
    optimizer.step()


def _load(assign: bool) -> Write:
    return lambda model: model.load_state_dict({n: v * 1.5 for n, v in model.state_dict().items()}, assign=assign)


@torch.no_grad()
def _prune(model: Model) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def _vector(model: Model) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.5, model.parameters())


def _written(get: Callable[[Model], Tensor], change: Callable[[Tensor], Tensor] = lambda t: t * 1.5) -> Write:
    return lambda model: get(model).data.copy_(change(get(model).data))


WRITES: dict[str, Write] = {
    "data": _written(weight_of),
    "one number": lambda model: weight_of(model).data.view(-1)[3].add_(1.0),
    "last linear": _written(lambda model: model[3].weight),
    "new data": _replace_data,
    "new parameter": _replace_parameter,
    "bytes": _write_bytes,
    "optimizer": _step,
    "load": _load(False),
    "load assign": _load(True),
    "pruned": _prune,
    "vector": _vector,
    "clip": _written(lambda model: model[0].input_quantizer.clip_max, lambda t: t * 0.5),
    "norm weight": _written(lambda model: model[1].weight),
    "norm bias": _written(lambda model: model[1].bias, lambda t: t + 0.5),
    "norm mean": _written(lambda model: model[1].running_mean, lambda t: t + 0.5),
    "norm variance": _written(lambda model: model[1].running_var),
    "norm eps": lambda model: setattr(model[1], "eps", 0.5),
    "layer bias": _written(lambda model: model[0].bias, lambda t: t + 0.5),
    "bits": lambda model: setattr(model[0].weight_quantizer, "num_bits", 4),
}


@torch.no_grad()
def check_changed(model: Model, x: Tensor, before: Tensor) -> None:
    """Check that the model gives what a copy gives, which knows nothing of its past, and not what it gave before."""
    expected = copy.deepcopy(model)
    assert all("kept" not in vars(module) for module in expected.modules())
    result = expected(x)
    assert not torch.equal(result, before)
    assert torch.equal(model(x), result)
    assert torch.equal(model(x), result)
    for index in (0, 3):
        assert torch.equal(model[index].weight_quantizer.scale, expected[index].weight_quantizer.scale)


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("grid", [False, True], ids=["plain", "grid"])
@pytest.mark.parametrize("name", WRITES)
def test_whatever_is_written_shows_in_the_next_batch(name: str, grid: bool, algo: str) -> None:
    model, x = evaluated(algo, grid)
    with torch.no_grad():
        before = model(x)
    WRITES[name](model)
    check_changed(model, x, before)


@pytest.mark.parametrize("grid", [False, True], ids=["plain", "grid"])
def test_writes_into_the_memory_of_all_parameters_show(grid: bool) -> None:
    model, x = evaluated(grid=grid)
    flat = on_flat_memory(model)
    with torch.no_grad():
        model(x)
        before = model(x)
        flat.mul_(1.5)
    check_changed(model, x, before)


def test_averages_that_are_swapped_in_for_a_batch_show_and_are_gone_after_it() -> None:
    model, x = evaluated()
    with torch.no_grad():
        before, own = model(x), weight_of(model).data.clone()
        weight_of(model).data.copy_(own * 0.5)
        check_changed(model, x, before)
        weight_of(model).data.copy_(own)
        assert torch.equal(model(x), before)


def test_masks_and_parametrizations_that_give_a_new_weight_each_time_show() -> None:
    model, x = evaluated()
    prune.l1_unstructured(model[0], "weight", amount=0.2)
    with torch.no_grad():
        before = model(x)
    model[0].weight_mask.data.zero_()
    check_changed(model, x, before)

    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    model, x = evaluated()
    scaled = Scaled()
    parametrize.register_parametrization(model[0], "weight", scaled)
    with torch.no_grad():
        before = model(x)
        scaled.factor = 0.5
        after = model(x)
        assert not torch.equal(after, before)
        scaled.factor = 1.0
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("grid", [False, True], ids=["plain", "grid"])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_scales_that_are_given_show(algo: str, grid: bool) -> None:
    model, x = evaluated(algo, grid)
    quantizer = model[0].weight_quantizer
    quantizer.freeze(model[0].weight)
    with torch.no_grad():
        before = model(x)
        quantizer.scale.data.mul_(1.7)
        check_changed(model, x, before)
        before = model(x)
        if algo == "arq_retrain":
            quantizer.unfreeze()
            check_changed(model, x, before)


def test_clips_of_a_frozen_quantizer_show() -> None:
    model, x = evaluated()
    model[0].input_quantizer.freeze()
    with torch.no_grad():
        before = model(x)
        model[0].input_quantizer.clip_max.data.mul_(0.5)
        assert torch.equal(model(x), before)  # is not in use
        model[0].input_quantizer.clip_max_previous.data.mul_(0.5)
        check_changed(model, x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_moved_and_one_under_autocast_have_weights_of_their_dtype(dtype: torch.dtype) -> None:
    model, x = evaluated()
    with torch.no_grad():
        before = model(x)
        if dtype is torch.bfloat16:
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(model(x), copy.deepcopy(model)(x))
            assert torch.equal(model(x), before)
        model.to(dtype)
        assert all("kept" not in vars(module) for module in model.modules())
        assert torch.equal(model(x.to(dtype)), copy.deepcopy(model)(x.to(dtype)))


def test_inference_mode_shares_with_no_grad_and_sees_writes() -> None:
    model, x = evaluated()
    with torch.no_grad():
        before = model(x)
    model.train().eval()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(x), before)
        with torch.no_grad():
            assert torch.equal(model(x), before)
    with torch.inference_mode():
        weight_of(model).data.mul_(1.5)
        changed = model(x)
    check_changed(model, x, before)
    assert torch.equal(changed, model(x))
    model(x).sum().backward()  # with a graph as well


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("grid", [False, True], ids=["plain", "grid"])
def test_the_second_batch_quantizes_no_weight_and_computes_no_factors(grid: bool, algo: str, frozen: bool) -> None:
    model, x = evaluated(algo, grid)
    if frozen:
        for index in (0, 3):
            model[index].weight_quantizer.freeze(model[index].weight)
            model[index].input_quantizer.freeze()
    with torch.no_grad():
        with Operators() as first:
            model.train().eval()
            model(x)
        with Operators() as second:
            model(torch.randn(3, 2, 6, 6))
    if not grid:
        assert first.counts["aten::round_"] == 4
        assert second.counts["aten::round_"] == 2  # those of the inputs
    else:  # which rounds biases by the scale of the input
        assert second.counts["aten::round_"] == first.counts["aten::round_"] - 2
    assert sum(first.counts[name] for name in QUANTIZING) > 0 or frozen
    assert {name: second.counts[name] for name in QUANTIZING if second.counts[name]} == {}
    assert second.host_reads == {}


def test_the_weights_of_the_compiled_executor_are_its_own() -> None:
    model, x = evaluated(execution="compiled")
    reference = copy.deepcopy(model)
    set_execution(reference, "composite")
    with torch.no_grad():
        expected, quantizer = model(x), model[0].weight_quantizer
        held = quantizer.kept.result[0][0]
        assert torch.equal(model(x), expected)
        assert quantizer.kept.result[0][0] is held
        torch.testing.assert_close(reference(x), expected, rtol=1e-5, atol=1e-6)
        set_execution(model, "composite")
        model(x)
    assert quantizer.kept.result[0][0] is not held


def test_recurrent_layers_quantize_their_weights_once() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    x = torch.randn(2, 5, 4)
    model = prepare_qat(Net(), None, x).train()
    model(x), model(x), model.eval()
    with torch.no_grad():
        before = model(x)
        with Operators() as operators:
            assert torch.equal(model(x), before)
        assert operators.counts["aten::amax"] == 0
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(model.layer, name).data.mul_(1.5)
            expected = copy.deepcopy(model)(x)
            assert not torch.equal(expected, before)
            assert torch.equal(model(x), expected)


def test_the_books_are_those_of_the_last_forward() -> None:
    model, x = evaluated()
    quantizer: WeightQuantizer = model[0].weight_quantizer
    quantizer.scale.fill_(7.0)
    with torch.no_grad():
        model(x)
    assert torch.equal(quantizer.scale, quantizer.compute_scale(model[0].weight))


def test_nothing_of_it_is_in_copies_pickles_and_states() -> None:
    model, _ = evaluated()
    fresh = prepare_qat(float_model(), None, torch.randn(2, 2, 6, 6))
    assert list(model.state_dict()) == list(fresh.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model[0].weight_quantizer)):
        assert all("kept" not in vars(module) for module in other.modules())


def test_training_frees_it() -> None:
    model, x = evaluated()
    model.train()
    assert all("kept" not in vars(module) for module in model.modules())
    with torch.no_grad():
        model(x)  # as the first forward of activation checkpointing
    assert all("kept" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("grid", [False, True], ids=["plain", "grid"])
def test_a_training_step_frees_it_if_the_mode_was_set_without_telling(grid: bool) -> None:
    model, x = evaluated(grid=grid)
    for module in model.modules():
        module.training = True  # as Lightning does after a validation
    model(x)
    assert all("kept" not in vars(model[index].weight_quantizer) for index in (0, 3))


def test_graphs_and_transforms_share_nothing() -> None:
    model, x = evaluated()
    with torch.no_grad():
        expected = model(x)
        model.train().eval()
        torch.testing.assert_close(torch.vmap(lambda part: model(part.unsqueeze(0)))(x).squeeze(1), expected)
        torch.compile(model, backend="eager")(x)
        torch.export.export(model, (x,))
        torch.jit.trace(model, (x,), check_trace=False)
        make_fx(model)(x)
    assert all("kept" not in vars(module) for module in model.modules())


def test_several_processes_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = evaluated()
    model.train().eval()
    monkeypatch.setattr("amct_lightning.quantizers.kept.several_processes", lambda: True)
    with torch.no_grad(), Operators() as operators:
        model(x)
    assert operators.counts["aten::clone"] == 0  # nor is there any more work than for quantizing
    assert all("kept" not in vars(module) for module in model.modules())


def test_a_weight_with_gaps_is_quantized_each_time() -> None:
    model, x = evaluated()
    wide = torch.randn(4, 2, 3, 6)
    model[0].weight = nn.Parameter(wide[..., ::2])
    with torch.no_grad():
        before = model(x)
        assert "kept" not in vars(model[0].weight_quantizer)
        model[0].weight.data.mul_(1.5)
        check_changed(model, x, before)


def test_nothing_is_kept_of_a_very_large_weight() -> None:
    x = torch.ones(1, 2048)
    model = prepare_qat(nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 8)), None, x).train()
    model(x)
    with torch.no_grad():
        model.eval()(x)
    assert [layer.weight_quantizer.kept is None for layer in model] == [True, False]
