"""Converting a model: what changes, what stays, what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, calibrate, prepare_qat, quantized_layers
from amct_lightning.config import LayerConfig, WeightConfig
from amct_lightning.conversion.convert import revert_layers
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules import QATLinear, activation_quantizers
from amct_lightning.modules.convolutions import QATConv2d


class Branches(nn.Module):
    """Two layers that read one tensor; the second in the module order runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.owner = nn.Conv2d(4, 4, 1)
        self.member = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        return self.member(x) + self.owner(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 6, 6)


@pytest.fixture
def model() -> Branches:
    return Branches()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return list(here) == list(there) and all(torch.equal(here[key], there[key]) for key in here)


def test_in_place_keeps_every_module_and_parameter_object(model: Branches, x: Tensor) -> None:
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert prepare_qat(model, None, x, inplace=True) is model
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_in_place_keeps_the_hooks_of_a_layer(model: Branches, x: Tensor) -> None:
    calls: list[str] = []
    model.stem.register_forward_hook(lambda *_: calls.append("forward"))
    prepare_qat(model, None, x, inplace=True)
    calls.clear()
    model(x)
    assert calls == ["forward"]


def test_in_place_keeps_the_attributes_of_a_layer(model: Branches, x: Tensor) -> None:
    model.stem.my_tag = "first"
    model.stem.weight.requires_grad_(False)
    prepare_qat(model, None, x, inplace=True)
    assert model.stem.my_tag == "first"
    assert not model.stem.weight.requires_grad


def test_a_copy_leaves_the_original_untouched(model: Branches, x: Tensor) -> None:
    before, kinds = state(model), [type(module) for module in model.modules()]
    converted = prepare_qat(model, None, x).train()
    converted(x).sum().backward()
    assert same(state(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_norm_stays_in_place(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    assert type(converted.bn) is nn.BatchNorm2d
    assert type(converted.stem) is QATConv2d


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_that_of_the_original(model: Branches, x: Tensor, training: bool) -> None:
    converted = prepare_qat(model.train(training), None, x)
    assert {module.training for module in converted.modules()} == {training}


def test_layers_that_read_one_tensor_share_one_quantizer(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    assert converted.owner.input_quantizer is converted.member.input_quantizer
    assert converted.stem.input_quantizer is not converted.owner.input_quantizer


def test_a_shared_quantizer_is_one_set_of_parameters(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    clips = [name for name, _ in converted.named_parameters() if name.endswith("clip_max")]
    assert clips == ["stem.input_quantizer.clip_max", "owner.input_quantizer.clip_max"]


def test_only_the_sharing_layer_that_runs_first_calibrates(model: Branches, x: Tensor) -> None:
    config = RetrainConfig(batch_num=2, layers={name: LayerConfig() for name in ("stem", "owner", "member")})
    converted = prepare_qat(model, config, x).train()
    assert (converted.owner.calibrates_input, converted.member.calibrates_input) == (False, True)
    converted(x)
    assert converted.owner.input_quantizer.calibrating
    converted(x)
    assert not converted.owner.input_quantizer.calibrating


def test_layers_with_different_settings_do_not_share(model: Branches, x: Tensor) -> None:
    config = RetrainConfig.default(model, x)
    config["member"] = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=False))
    converted = prepare_qat(model, config, x)
    assert converted.owner.input_quantizer is not converted.member.input_quantizer


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_converted_model_shares_like_the_original(model: Branches, x: Tensor, duplicate: Any) -> None:
    converted = prepare_qat(model, None, x)
    twin = duplicate(converted)
    assert twin.owner.input_quantizer is twin.member.input_quantizer
    assert twin.owner.input_quantizer is not converted.owner.input_quantizer


def test_the_parameters_of_a_deepcopy_are_its_own(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    twin = copy.deepcopy(converted)
    originals = {id(p) for p in converted.parameters()}
    assert not any(id(p) in originals for p in twin.parameters())


def test_disabled_layers_stay_float(model: Branches, x: Tensor) -> None:
    config = RetrainConfig(layers={"stem": LayerConfig(), "owner": LayerConfig(retrain_enable=False)})
    converted = prepare_qat(model, config, x)
    assert list(quantized_layers(converted)) == ["stem"]
    assert type(converted.owner) is nn.Conv2d


def test_quantized_layers_are_listed_in_module_order_also_through_a_wrapper(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    assert list(quantized_layers(converted)) == ["stem", "owner", "member"]
    assert list(quantized_layers(nn.Sequential(converted))) == ["0.stem", "0.owner", "0.member"]


def test_a_float_model_has_no_quantized_layers(model: Branches) -> None:
    assert quantized_layers(model) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_weight_is_refused_by_name_and_nothing_is_converted(
    model: Branches, x: Tensor, value: float
) -> None:
    with torch.no_grad():
        model.member.weight[0, 0, 0, 0] = value
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"'member' contains NaN or infinite values\. Start from"):
        prepare_qat(model, None, x, inplace=True)
    assert [type(module) for module in model.modules()] == kinds


def test_a_quantized_model_is_refused_with_the_names_of_its_layers(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    with pytest.raises(RuntimeError, match=r"cannot be quantized .* quantized already \(stem, owner, member\)"):
        prepare_qat(converted, None, x)


def test_a_model_that_contains_a_quantized_one_is_refused(model: Branches, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"0\.stem"):
        prepare_qat(nn.Sequential(prepare_qat(model, None, x)), None, x)


def test_two_models_are_converted_independently(x: Tensor) -> None:
    first = prepare_qat(Branches(), None, x).train()
    second = prepare_qat(nn.Sequential(nn.Linear(6, 3)), None, x).train()
    first(x)
    assert not any(q.calibrating for q in activation_quantizers(first).values())
    assert all(q.calibrating for q in activation_quantizers(second).values())


def test_subclasses_of_a_layer_type_stay_float() -> None:
    class MyLinear(nn.Linear):
        pass

    converted = prepare_qat(nn.Sequential(nn.Linear(4, 4), MyLinear(4, 4)), None, torch.randn(2, 4))
    assert [type(layer) for layer in converted] == [QATLinear, MyLinear]


def test_calibrate_finishes_calibration_without_training_anything(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x).train()
    weights = {k: v for k, v in state(converted).items() if "quantizer" not in k}
    calibrate(converted, [x])
    assert not any(q.calibrating for q in activation_quantizers(converted).values())
    assert all(torch.equal(converted.state_dict()[key], value) for key, value in weights.items())
    assert {module.training for module in converted.modules()} == {True}


def test_calibrate_leaves_nan_out_and_names_the_layer(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'stem'"):
        calibrate(converted, [bad])
    assert all(torch.isfinite(q.clip_max) for q in activation_quantizers(converted).values())


@pytest.mark.parametrize(
    ("batches", "message"),
    [("tensor", r"pass \[tensor\]"), ("lists", r"\(x for x, _ in loader\)")],
)
def test_calibrate_says_what_batches_have_to_be(model: Branches, x: Tensor, batches: str, message: str) -> None:
    given = x if batches == "tensor" else [[x, torch.zeros(2)]]
    with pytest.raises(TypeError, match=message):
        calibrate(prepare_qat(model, None, x), given)


def test_calibrate_refuses_a_float_model(model: Branches, x: Tensor) -> None:
    with pytest.raises(ValueError, match="no quantized layers"):
        calibrate(model, [x])


def test_reverting_gives_back_the_float_model(model: Branches, x: Tensor) -> None:
    before = state(model)
    converted = prepare_qat(model, None, x, inplace=True, search_n=True).train()
    converted(x)
    assert find_plan(converted) is not None
    revert_layers(converted)
    assert find_plan(model) is None
    assert list(converted.state_dict()) == list(before)
    assert [type(layer) for layer in (model.stem, model.owner)] == [nn.Conv2d, nn.Conv2d]
    assert not any(module._forward_hooks for module in model.modules())
    assert list(quantized_layers(prepare_qat(model, None, x))) == ["stem", "owner", "member"]


def test_calibrate_says_which_layers_got_too_few_batches(model: Branches, x: Tensor) -> None:
    config = RetrainConfig.default(model, x)
    config.batch_num = 3
    with pytest.raises(ValueError, match=r"stem, owner.*`batch_num`"):
        calibrate(prepare_qat(model, config, x), [x, x])


def test_calibrate_leaves_calibrated_quantizers_alone(model: Branches, x: Tensor) -> None:
    converted = prepare_qat(model, None, x).train()
    converted(x)
    before = state(converted)
    calibrate(converted, [x * 5])
    assert same(state(converted), before)


def test_a_transformer_encoder_evaluates_with_padding_as_it_trains() -> None:
    """Its nested-tensor path, which a padding mask switches on in evaluation, has no rounding."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    converted = prepare_qat(nn.TransformerEncoder(layer, 2), None, (x,)).train()
    calibrate(converted, [x])
    trained = converted.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = converted.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=1e-4, atol=1e-4)
