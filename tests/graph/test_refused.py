"""What is not quantized and why: single layers, whole models, and layers that a config names all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from amct_lightning import RetrainConfig, prepare_qat
from amct_lightning.config import LayerConfig, QuantChoices
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.graph.eligibility import find_candidates
from amct_lightning.graph.float_model import check_float_model
from tests.graph.models import Model


class MyLinear(nn.Linear):
    """A subclass that does nothing."""


class OwnWeights(nn.Linear):
    """A subclass that holds its weight in another way."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.rows = nn.Parameter(self.weight.detach().clone())
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.rows, self.bias)


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = torch.no_grad()(layer.forward)  # type: ignore[method-assign]
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (
        lambda: MyLinear(4, 4),
        "is a MyLinear, a subclass of Linear; only the exact class is quantized, as in AMCT",
    ),
    "subclass_without_weight": (OwnWeights, "is a OwnWeights, a subclass of Linear"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(linear()),
        "'weight' is computed by a parametrization (e.g. weight norm); remove_parametrizations makes it permanent",
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), "'weight' is computed by a parametrization"),
    "old_weight_norm": (lambda: nn.utils.weight_norm(linear()), "'weight' is no parameter but computed before each"),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(linear()), "remove_spectral_norm or"),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "prune.remove makes it permanent"),
    "replaced_forward": (replaced_forward, "its forward was replaced on the object"),
    "complex": (
        lambda: nn.Linear(4, 4, dtype=torch.complex64),
        "'weight' is torch.complex64; only real floating-point weights are quantized",
    ),
}


@pytest.mark.parametrize(("make", "reason"), LAYERS.values(), ids=LAYERS)
def test_a_layer_stays_in_float_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = Model(lambda m, x: m.b(m.a(x).to(next(m.b.parameters()).dtype)))
    model.b = make()
    candidates, _ = find_candidates(model, torch.randn(2, 4))
    assert candidates["a"].reason is None
    assert reason in str(candidates["b"].reason)


CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "twice": (lambda m, x: m.b(m.b(m.a(x))), "called 2 times; quantized only with allow_reuse=True"),
    "never": (lambda m, x: m.a(x), "never called with the given input_data"),
    "functional": (
        lambda m, x: functional.linear(m.a(x), m.b.weight, m.b.bias),
        "never called: other code reads its weight, as in F.linear(x, layer.weight); call the layer instead",
    ),
    "forward_directly": (lambda m, x: m.b.forward(m.a(x)), "call the layer instead"),
}


@pytest.mark.parametrize(("forward", "reason"), CALLS.values(), ids=CALLS)
def test_the_way_a_layer_is_called_can_be_the_reason(forward: Callable[..., Any], reason: str) -> None:
    candidates, _ = find_candidates(Model(forward), torch.randn(2, 4))
    assert candidates["a"].reason is None
    assert reason in str(candidates["b"].reason)


def test_a_lazy_layer_that_is_never_called_has_no_weights_yet() -> None:
    model = Model(lambda m, x: m.a(x))
    model.b = nn.LazyLinear(3)
    candidates, _ = find_candidates(model, torch.randn(2, 4))
    assert candidates["b"].reason == "never called with the given input_data"


def test_two_layers_that_share_a_weight_are_both_refused() -> None:
    model = Model(lambda m, x: m.b(m.a(x)) + m.conv(x.view(1, 2, 2, 2)).sum())
    model.b.weight = model.a.weight
    candidates, _ = find_candidates(model, torch.randn(2, 4))
    assert {candidates[name].reason for name in "ab"} == {"its weight is shared with another layer"}


def test_a_model_of_subclasses_only_says_so() -> None:
    with pytest.raises(ValueError, match=r"No supported layers .*'0': is a MyLinear, a subclass of Linear"):
        make_plan(nn.Sequential(MyLinear(4, 4)), None, torch.randn(2, 4))


class TestModel:
    """Models whose layers cannot be replaced are refused before anything is run."""

    def inside(self, module: nn.Module) -> nn.Module:
        return nn.ModuleDict({"head": linear(), "body": module})

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.compile(linear()), r"was compiled with torch\.compile before .* compile the converted"),
            (lambda: torch.jit.script(nn.Sequential(linear())), r"is a TorchScript module.*Give the Python module"),
            (lambda: torch.jit.trace(nn.Sequential(linear()), torch.ones(1, 4)), r"is a TorchScript module"),
        ],
        ids=["compile", "script", "trace"],
    )
    def test_compiled_and_scripted_layers(self, make: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(RuntimeError, match=rf"^Module 'body' {message}"):
            check_float_model(self.inside(make()))
        with pytest.raises(RuntimeError, match=rf"^The model {message}"):
            prepare_qat(make(), None, torch.ones(1, 4))

    def test_a_module_compiled_in_place(self) -> None:
        model = self.inside(nn.Sequential(linear()))
        model["body"].compile(backend="eager")
        with pytest.raises(RuntimeError, match=r"Module 'body' was compiled in place \(Sequential\.compile\(\)\)"):
            check_float_model(model)

    def test_a_compiled_or_scripted_part_without_layers_is_no_obstacle(self) -> None:
        check_float_model(self.inside(torch.jit.script(nn.ReLU())))
        check_float_model(self.inside(torch.compile(nn.ReLU())))

    def test_several_copies_of_data_parallel(self) -> None:
        wrapper = nn.DataParallel(nn.Sequential(linear()), device_ids=[])
        wrapper.device_ids = [0, 1]
        with pytest.raises(RuntimeError, match=r"wrapped in DataParallel.*forget their calibration"):
            check_float_model(wrapper)

    def test_a_model_wrapped_for_several_processes(self) -> None:
        class FullyShardedDataParallel(nn.Sequential):
            pass

        with pytest.raises(RuntimeError, match=r"wrapped in FullyShardedDataParallel .* wrap the converted model"):
            check_float_model(FullyShardedDataParallel(linear()))


class TestNamedInConfig:
    """A config that names a layer which cannot be quantized is told why."""

    @pytest.fixture
    def model(self) -> Model:
        return Model(lambda m, x: m.b(m.b(m.a(x))))

    @pytest.mark.parametrize("kind", [RetrainConfig, QuantChoices])
    def test_the_error_gives_source_and_reason(self, model: Model, kind: Any) -> None:
        config = kind(layers={"a": LayerConfig(), "b": LayerConfig()})
        message = r"unsupported layer \{'b'\} in my\.json: 'b': called 2 times; quantized only with allow_reuse=True\."
        with pytest.raises(ValueError, match=message):
            make_plan(model, config, torch.randn(2, 4), source="my.json")
        assert len(make_plan(model, config, torch.randn(2, 4), allow_reuse=True).layers) == 2

    def test_every_such_layer_is_listed(self, model: Model) -> None:
        config = RetrainConfig(layers={"b": LayerConfig(), "conv": LayerConfig()})
        with pytest.raises(ValueError, match=r"\{'b', 'conv'\} .*'b': called 2 .*'conv': never called"):
            make_plan(model, config, torch.randn(2, 4))

    def test_a_second_name_of_a_module_is_explained(self) -> None:
        model = Model(lambda m, x: m.a(x))
        model.alias = model.a
        with pytest.raises(ValueError, match=r"\{'alias'\} .*another name of 'a'; use that one"):
            make_plan(model, RetrainConfig(layers={"alias": LayerConfig()}), torch.randn(2, 4))

    def test_a_name_that_is_nowhere_in_the_model_is_left_to_the_config(self, model: Model) -> None:
        with pytest.raises(ValueError, match=r"unsupported layer 'nope'"):
            make_plan(model, RetrainConfig(layers={"nope": LayerConfig()}), torch.randn(2, 4))

    @pytest.mark.parametrize("kind", [RetrainConfig, QuantChoices])
    def test_a_type_that_amct_does_not_know_is_quantized_only_by_name(self, kind: Any) -> None:
        model = nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.Conv3d(2, 2, 1))
        x = torch.randn(1, 2, 3, 3, 3)
        (refused,) = make_plan(model, None, x).refused
        assert (refused.name, refused.type) == ("0", "ConvTranspose3d")
        assert "only if the config names it" in refused.reason
        named = make_plan(model, kind(layers={"0": LayerConfig()}), x)
        assert "0" in [layer.name for layer in named.layers]
        assert named.refused == ()


def test_the_plan_keeps_what_was_refused_but_is_compared_without_it() -> None:
    plan = make_plan(Model(lambda m, x: m.a(x)), None, torch.randn(2, 4))
    assert [(layer.name, layer.type) for layer in plan.refused] == [("b", "Linear"), ("conv", "Conv2d")]
    again = QuantPlan.from_dict(plan.to_dict())
    assert (again.refused, again.ends) == (plan.refused, plan.ends)
    assert QuantPlan(plan.config, plan.layers) == plan
