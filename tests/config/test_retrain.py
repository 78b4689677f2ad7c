"""The configuration of a model: dict-like access, defaults, and its fit to the layers the model has."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning.config import DataConfig, LayerConfig, RetrainConfig, WeightConfig


def config_of(*names: str, **weight: Any) -> RetrainConfig:
    layer = LayerConfig(retrain_weight_config=WeightConfig(**weight))
    return RetrainConfig(layers=dict.fromkeys(names, layer))


def test_layers_are_accessed_like_a_dict():
    config = config_of("conv1", "fc")
    assert "fc" in config
    assert len(config) == 2
    assert list(config) == ["conv1", "fc"]
    del config["conv1"]
    config["new"] = LayerConfig(retrain_enable=False)
    assert {name: layer.retrain_enable for name, layer in config.items()} == {"fc": True, "new": False}


@pytest.mark.parametrize("layer", [{"retrain_enable": True}, None, DataConfig()])
def test_only_layer_settings_can_be_assigned(layer: Any):
    config = config_of("fc")
    with pytest.raises(TypeError, match="layer 'fc' must be a LayerConfig"):
        config["fc"] = layer
    with pytest.raises(TypeError, match="layer 'fc' must be a LayerConfig"):
        RetrainConfig(layers={"fc": layer})


def test_a_layer_name_that_the_file_format_needs_is_refused():
    with pytest.raises(ValueError, match=r"'version'.*rename"):
        config_of("version")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("batch_num", 0, ValueError),
        ("batch_num", 1.0, TypeError),
        ("version", 2, ValueError),
        ("fakequant_precision_mode", "FP16", ValueError),
        ("fakequant_precision_mode", 1, TypeError),
        ("layers", [], TypeError),
        ("batchnum", 1, AttributeError),
    ],
)
def test_later_assignments_are_checked_like_arguments(name: str, value: Any, kind: type[Exception]):
    with pytest.raises(kind, match="RetrainConfig"):
        setattr(RetrainConfig(), name, value)
    if kind is not AttributeError:
        with pytest.raises(kind):
            RetrainConfig(**{name: value})


def test_a_configuration_does_not_share_the_dict_it_was_made_from():
    layers = {"fc": LayerConfig()}
    config = RetrainConfig(layers=layers)
    del config["fc"]
    assert layers


def test_copies_and_pickles_are_equal():
    config = config_of("conv1", "fc", dst_type="INT4")
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_resolving_fills_the_default_of_each_layer_type():
    eligible = {
        "c": nn.Conv1d(2, 2, 1),
        "t": nn.ConvTranspose2d(2, 2, 1),
        "l": nn.Linear(2, 2),
        "r": nn.GRU(2, 2),
    }
    resolved = config_of(*eligible).resolve(eligible)
    channel_wise = {name: layer.retrain_weight_config.channel_wise for name, layer in resolved.items()}
    assert channel_wise == {"c": True, "t": True, "l": False, "r": True}


def test_resolving_orders_and_disables_omitted_layers(eligible: dict[str, nn.Module]):
    config = config_of("fc", "conv1")
    resolved = config.resolve(eligible)
    enabled = [(name, layer.retrain_enable) for name, layer in resolved.items()]
    assert enabled == [("conv1", True), ("conv2", False), ("fc", True)]
    assert list(config) == ["fc", "conv1"]


def test_resolving_keeps_explicit_settings(eligible: dict[str, nn.Module]):
    layer = LayerConfig(True, DataConfig(dst_type="INT16"), WeightConfig("ulq_retrain", channel_wise=False))
    config = RetrainConfig(batch_num=3, fakequant_precision_mode="FORCE_FP16_QUANT", layers={"conv1": layer})
    resolved = config.resolve(eligible)
    assert resolved["conv1"] == layer
    assert (resolved.batch_num, resolved.fakequant_precision_mode) == (3, "FORCE_FP16_QUANT")


def test_resolving_twice_changes_nothing(eligible: dict[str, nn.Module]):
    resolved = config_of("conv1").resolve(eligible)
    assert resolved.resolve(eligible) == resolved


def test_an_unknown_layer_is_named_with_the_closest_known_ones(eligible: dict[str, nn.Module]):
    with pytest.raises(ValueError, match=r"^unsupported layer 'con2' in my\.json.*Did you mean 'conv2'.*'fc'"):
        config_of("conv1", "con2").resolve(eligible, "my.json")


def test_a_long_list_of_known_layers_is_abbreviated():
    eligible: dict[str, nn.Module] = {f"block{i}": nn.Linear(2, 2) for i in range(50)}
    with pytest.raises(ValueError, match=r"'block7' and 42 more\.$"):
        config_of("nope").resolve(eligible)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_linear_layer_can_be_channel_wise_but_not_in_amct_s_file(eligible: dict[str, nn.Module], enabled: bool):
    config = config_of("conv1")
    config["fc"] = LayerConfig(enabled, retrain_weight_config=WeightConfig(channel_wise=True))
    assert config.resolve(eligible, "in code")["fc"] == config["fc"]
    config = RetrainConfig.from_dict(config.to_dict(), "my.json")
    with pytest.raises(ValueError, match=r"^my\.json: layer 'fc'.*channel_wise.*can not be channel-wise"):
        config.resolve(eligible, "my.json")


@pytest.mark.parametrize("layers", [{}, {"fc": LayerConfig(retrain_enable=False)}])
def test_nothing_to_quantize_is_an_error(eligible: dict[str, nn.Module], layers: dict[str, LayerConfig]):
    with pytest.raises(ValueError, match=r"No layer retrain enabled.*retrain_enable"):
        RetrainConfig(layers=layers).resolve(eligible)


UNPACKABLE = {
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), "groups=4"),
    "grouped_up": (nn.ConvTranspose2d(4, 4, 2, groups=2), "groups=2"),
    "odd_conv": (nn.Conv3d(3, 4, 1), "in_channels=3 is odd"),
    "odd_up": (nn.ConvTranspose1d(5, 4, 1), "in_channels=5 is odd"),
    "odd_linear": (nn.Linear(7, 4), "in_features=7 is odd"),
    "odd_input": (nn.LSTM(3, 4), "input_size=3 is odd"),
    "odd_hidden": (nn.GRU(4, 5), "hidden_size=5 is odd"),
}
PACKABLE = {
    "conv": nn.Conv2d(4, 3, 3),
    "up": nn.ConvTranspose1d(4, 3, 1),
    "linear": nn.Linear(4, 3),
    "lstm": nn.LSTM(4, 6),
}


@pytest.mark.parametrize("name", UNPACKABLE)
@pytest.mark.parametrize("data_type", ["INT4", "INT8"])
def test_int4_weights_that_cannot_be_packed_become_int8(name: str, data_type: str):
    module, reason = UNPACKABLE[name]
    layer = LayerConfig(True, DataConfig(dst_type=data_type), WeightConfig(dst_type="INT4"))
    with pytest.warns(UserWarning) as caught:
        resolved = RetrainConfig(layers={name: layer}).resolve({name: module}, "my.json")[name]
    assert (resolved.retrain_data_config.dst_type, resolved.retrain_weight_config.dst_type) == (
        "INT8",
        "INT8",
    )
    assert f"'{name}' ({reason})" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_one_warning_names_all_downgraded_layers():
    modules = {name: module for name, (module, _) in UNPACKABLE.items()}
    with pytest.warns(UserWarning) as caught:
        config_of(*modules, dst_type="INT4").resolve(modules)
    assert len(caught) == 1
    assert all(f"'{name}'" in str(caught[0].message) for name in modules)


@pytest.mark.parametrize("name", PACKABLE)
def test_int4_weights_that_can_be_packed_stay(name: str):
    layer = LayerConfig(True, DataConfig(dst_type="INT4"), WeightConfig(dst_type="INT4"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved = RetrainConfig(layers={name: layer}).resolve({name: PACKABLE[name]})[name]
    assert resolved.retrain_data_config == layer.retrain_data_config
    assert resolved.retrain_weight_config.dst_type == "INT4"


def test_disabled_layers_are_not_downgraded(eligible: dict[str, nn.Module]):
    int4 = LayerConfig(False, retrain_weight_config=WeightConfig(dst_type="INT4"))
    config = RetrainConfig(layers={"conv1": int4, "fc": LayerConfig()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.resolve(eligible)["conv1"].retrain_weight_config.dst_type == "INT4"


def test_the_default_configuration_lists_all_eligible_layers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    config = RetrainConfig.default(model, torch.ones(1, 2, 4, 4))
    assert list(config) == ["0", "3"]
    assert [layer.retrain_weight_config.channel_wise for layer in config.values()] == [True, False]
    assert all(layer.retrain_enable for layer in config.values())


def test_a_model_without_eligible_layers_has_no_default():
    with pytest.raises(ValueError, match=r"No supported layers in ReLU.*input_data"):
        RetrainConfig.default(nn.ReLU(), torch.ones(1))
