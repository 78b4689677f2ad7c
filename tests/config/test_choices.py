"""What choices mean for a model: which settings each layer gets, and which choices are refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from amct_lightning.config import DataConfig, LayerConfig, QuantChoices, RetrainConfig, WeightConfig
from tests.config.strategies import quant_choices

LAYERS = {
    "stem": nn.Conv2d(4, 8, 3),
    "blocks.0.fc1": nn.Linear(8, 8),
    "blocks.0.fc2": nn.Linear(8, 8),
    "blocks.1.fc1": nn.Linear(8, 8),
    "head": nn.Linear(8, 2),
}
INT16 = LayerConfig(retrain_data_config=DataConfig(dst_type="INT16"))
INT4 = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4"))


def enabled(choices: QuantChoices, layers: dict[str, nn.Module] = LAYERS) -> list[str]:
    return [name for name, layer in choices.resolve(layers).items() if layer.retrain_enable]


def types(choices: QuantChoices) -> dict[str, str]:
    return {name: layer.retrain_data_config.dst_type for name, layer in choices.resolve(LAYERS).items()}


def test_no_choices_are_the_defaults_for_every_layer():
    config = QuantChoices().resolve(LAYERS)
    assert list(config) == list(LAYERS)
    assert config == RetrainConfig(layers=dict.fromkeys(LAYERS, LayerConfig())).resolve(LAYERS)


def test_settings_by_name_beat_settings_by_type_beat_the_defaults():
    choices = QuantChoices(defaults=INT4, types={"Linear": INT16}, layers={"head": LayerConfig()})
    config = choices.resolve(LAYERS)
    found = {
        name: (layer.retrain_data_config.dst_type, layer.retrain_weight_config.dst_type)
        for name, layer in config.items()
    }
    assert found["stem"] == ("INT8", "INT4")
    assert found["blocks.0.fc1"] == ("INT16", "INT8")
    assert found["head"] == ("INT8", "INT8")


def test_an_entry_replaces_the_defaults_completely():
    defaults = LayerConfig(
        retrain_data_config=DataConfig(clip_max=2.0, clip_min=-2.0, fixed_min=False),
        retrain_weight_config=WeightConfig("ulq_retrain", channel_wise=False),
    )
    config = QuantChoices(defaults=defaults, layers={"stem": INT16}).resolve(LAYERS)
    assert config["stem"].retrain_data_config == DataConfig(dst_type="INT16")
    assert config["stem"].retrain_weight_config == WeightConfig(channel_wise=True)


def test_of_several_patterns_the_last_written_counts():
    choices = QuantChoices(layers={"blocks.0.fc1": LayerConfig(), "*fc1": INT16, "*.1.*": LayerConfig()})
    assert types(choices) == {
        "stem": "INT8",
        "blocks.0.fc1": "INT16",
        "blocks.0.fc2": "INT8",
        "blocks.1.fc1": "INT8",
        "head": "INT8",
    }


def test_the_name_of_a_layer_is_no_pattern():
    layers = {"conv[1]": nn.Linear(8, 8), "conv1": nn.Linear(8, 8)}
    assert enabled(QuantChoices(skip_layers=("conv[1]",)), layers) == ["conv1"]
    config = QuantChoices(layers={"conv[1]": INT16}).resolve(layers)
    assert [layer.retrain_data_config.dst_type for layer in config.values()] == ["INT16", "INT8"]


def test_what_is_no_name_is_a_pattern_with_brackets():
    assert enabled(QuantChoices(skip_layers=("blocks.[01].fc1",))) == ["stem", "blocks.0.fc2", "head"]


def test_layers_are_skipped_by_name_pattern_and_type():
    assert enabled(QuantChoices(skip_layers=("head", "*.0.*"))) == ["stem", "blocks.1.fc1"]
    assert enabled(QuantChoices(skip_types=("Linear",))) == ["stem"]


def test_skipped_layers_show_the_defaults():
    config = QuantChoices(defaults=INT16, types={"Conv2d": LayerConfig()}, skip_layers=("head",)).resolve(LAYERS)
    assert config["head"] == dataclasses.replace(config["blocks.0.fc1"], retrain_enable=False)
    assert config["head"].retrain_data_config.dst_type == "INT16"


def test_names_beat_types_and_skipping_beats_settings():
    assert enabled(QuantChoices(skip_types=("Linear",), layers={"head": LayerConfig()})) == ["stem", "head"]
    assert "head" not in enabled(QuantChoices(skip_layers=("head",), types={"Linear": LayerConfig()}))
    assert "head" not in enabled(QuantChoices(skip_layers=("head",), layers={"h*": LayerConfig()}))
    assert enabled(QuantChoices(skip_types=("Linear",), types={"Linear": LayerConfig()})) == ["stem"]


def test_under_amct_s_rules_an_entry_quantizes_a_layer_that_is_to_be_skipped():
    skip = {"skip_layers": ("head",), "skip_types": ("Linear",), "amct_rules": True}
    assert enabled(QuantChoices(layers={"head": LayerConfig()}, **skip)) == ["stem", "head"]
    by_type = QuantChoices(skip_types=("Linear", "Conv2d"), types={"Conv2d": LayerConfig()}, amct_rules=True)
    assert enabled(by_type) == ["stem"]


def test_under_amct_s_rules_settings_by_type_beat_the_skipping_of_a_name_with_a_warning():
    choices = QuantChoices(skip_layers=("head", "stem"), types={"Linear": LayerConfig()}, amct_rules=True)
    with pytest.warns(UserWarning, match=r"^config: 'head' is to be skipped but is quantized"):
        assert "head" in enabled(choices)


def channel_wise(choices: QuantChoices) -> list[bool | None]:
    return [layer.retrain_weight_config.channel_wise for layer in choices.resolve(LAYERS).values()]


@pytest.mark.parametrize("amct_rules", [False, True])
def test_channel_wise_for_all_applies_to_the_layers_that_can_be(amct_rules: bool):
    """AMCT refuses a model with a Linear then."""
    defaults = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=True))
    found = channel_wise(QuantChoices(defaults=defaults, amct_rules=amct_rules))
    assert found == [True, *[not amct_rules] * 4]
    assert channel_wise(QuantChoices(amct_rules=amct_rules)) == [True, *[False] * 4]


@pytest.mark.parametrize("place", ["types", "layers"])
def test_an_entry_makes_a_linear_layer_channel_wise(place: str):
    entry = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=True))
    choices = QuantChoices(**{place: {"Linear" if place == "types" else "head": entry}})
    assert channel_wise(choices) == [True, *[place == "types"] * 3, True]


def test_a_linear_layer_that_is_skipped_shows_what_amct_s_files_can_say():
    defaults = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=True))
    config = QuantChoices(defaults=defaults, skip_types=("Linear",)).resolve(LAYERS)
    again = RetrainConfig.from_dict(json.loads(config.to_text()))
    assert again.resolve(LAYERS) == config


@pytest.mark.parametrize("place", ["types", "layers"])
def test_under_amct_s_rules_an_entry_that_makes_a_linear_layer_channel_wise_is_refused(place: str):
    entry = LayerConfig(retrain_weight_config=WeightConfig(channel_wise=True))
    choices = QuantChoices(**{place: {"Linear" if place == "types" else "head": entry}}, amct_rules=True)
    with pytest.raises(ValueError, match=r"^my\.yaml: layer '(head|blocks\.0\.fc1)'.*can not be channel-wise"):
        choices.resolve(LAYERS, "my.yaml")


def test_int4_weights_that_cannot_be_packed_become_int8_with_a_warning():
    odd = {"stem": nn.Conv2d(3, 8, 3), "head": nn.Linear(8, 2)}
    a4w4 = LayerConfig(True, DataConfig(dst_type="INT4"), WeightConfig(dst_type="INT4"))
    with pytest.warns(UserWarning, match=r"my\.cfg: INT8 .*'stem' \(in_channels=3 is odd\)"):
        config = QuantChoices(defaults=a4w4).resolve(odd, "my.cfg")
    assert [layer.retrain_data_config.dst_type for layer in config.values()] == ["INT8", "INT4"]
    assert [layer.retrain_weight_config.dst_type for layer in config.values()] == ["INT8", "INT4"]


def test_under_amct_s_rules_names_are_no_patterns():
    with pytest.raises(ValueError, match=r"^my\.cfg: cannot skip layer '\*', but the model has no such layer"):
        QuantChoices(skip_layers=("*",), amct_rules=True).resolve(LAYERS, "my.cfg")


def test_a_name_with_characters_of_patterns_fits_itself():
    layers = {"a[0]": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    assert enabled(QuantChoices(skip_layers=("a[0]",)), layers) == ["b"]


@pytest.mark.parametrize("place", ["skip_layers", "layers"])
def test_a_pattern_that_fits_no_layer_is_refused_with_the_closest_names(place: str):
    names: Any = ("haed",) if place == "skip_layers" else {"haed": INT16}
    message = (
        r"^my\.yaml: .*layer 'haed', but it fits no layer.* Did you mean 'head'\? Layers that can be quantized: 'stem'"
    )
    with pytest.raises(ValueError, match=message):
        QuantChoices(**{place: names}).resolve(LAYERS, "my.yaml")


@pytest.mark.parametrize("place", ["skip_types", "types"])
def test_a_type_that_cannot_be_quantized_is_refused_with_the_closest_names(place: str):
    names: Any = ("Conv2D",) if place == "skip_types" else {"Conv2D": INT16}
    message = r"^my\.yaml: .*layer type 'Conv2D'.* Did you mean '.*Conv2d'.*Types that can be quantized: .*GRU"
    with pytest.raises(ValueError, match=message):
        QuantChoices(**{place: names}).resolve(LAYERS, "my.yaml")


def test_a_type_that_the_model_does_not_have_is_no_mistake():
    assert enabled(QuantChoices(skip_types=("GRU",), types={"LSTM": INT16})) == list(LAYERS)


@pytest.mark.parametrize("choices", [QuantChoices(skip_layers=("*",)), QuantChoices(skip_types=("Linear", "Conv2d"))])
def test_skipping_everything_is_refused(choices: QuantChoices):
    with pytest.raises(ValueError, match=r"^my\.yaml: No layer retrain enabled.*'stem'.*Skip fewer"):
        choices.resolve(LAYERS, "my.yaml")


@pytest.mark.parametrize("field", ["skip_layers", "skip_types"])
def test_a_repeated_name_in_a_skip_list_only_warns(field: str):
    name = "head" if field == "skip_layers" else "Linear"
    with pytest.warns(UserWarning, match=rf"^config: named more than once to be skipped: '{name}'"):
        assert "head" not in enabled(QuantChoices(**{field: (name, name)}))


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("batch_num", 0, ValueError),
        ("batch_num", "1", TypeError),
        ("fakequant_precision_mode", "FP16", ValueError),
        ("defaults", None, TypeError),
        ("defaults", LayerConfig(retrain_enable=False), ValueError),
        ("types", [INT4], TypeError),
        ("types", {"Linear": {}}, TypeError),
        ("layers", {3: INT4}, TypeError),
        ("layers", {"head": LayerConfig(retrain_enable=False)}, ValueError),
        ("skip_layers", "head", TypeError),
        ("skip_layers", ["head"], TypeError),
        ("skip_types", (1,), TypeError),
        ("amct_rules", 1, TypeError),
    ],
)
def test_choices_check_themselves(field: str, value: Any, kind: type[Exception]):
    with pytest.raises(kind, match=rf"^QuantChoices\.{field}") as caught:
        QuantChoices(**{field: value})
    assert type(caught.value) is kind


def test_choices_are_frozen_and_can_be_pickled():
    choices = QuantChoices(layers={"head": INT16}, skip_layers=("stem",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        choices.batch_num = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(choices)) == choices


def test_choices_do_not_share_the_dicts_they_were_made_from():
    layers = {"head": INT16}
    choices = QuantChoices(layers=layers)
    layers["head"] = None  # type: ignore[assignment]
    assert choices.layers == {"head": INT16}


def expected(choices: QuantChoices, name: str) -> LayerConfig:
    """The rule of precedence, written down a second time."""
    kind = type(LAYERS[name]).__name__
    by_name = [settings for pattern, settings in choices.layers.items() if fits(choices, name, pattern)]
    by_type = choices.types.get(kind)
    settings = by_name[-1] if by_name else by_type or choices.defaults
    named = any(fits(choices, name, pattern) for pattern in choices.skip_layers)
    if choices.amct_rules:
        is_skipped = not (by_name or by_type) and (named or kind in choices.skip_types)
    else:
        is_skipped = named or (not by_name and kind in choices.skip_types)
    return dataclasses.replace(settings, retrain_enable=not is_skipped)


def fits(choices: QuantChoices, name: str, pattern: str) -> bool:
    return name == pattern if choices.amct_rules else fnmatchcase(name, pattern)


def is_channel_wise_linear(choices: QuantChoices) -> bool:
    by_name = [settings for pattern, settings in choices.layers.items() if pattern != "stem"]
    linear = [*by_name, choices.types.get("Linear", LayerConfig())]
    return any(settings.retrain_weight_config.channel_wise for settings in linear)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None)
@given(
    choices=quant_choices(["stem", "blocks.0.fc1", "blocks.*", "*.fc1", "head", "*"], ["Conv2d", "Linear", "GRU"]),
    amct_rules=st.booleans(),
)
def test_any_choices_follow_the_rule_and_survive_the_way_through_json(choices: QuantChoices, amct_rules: bool):
    if amct_rules:
        literal = {name: settings for name, settings in choices.layers.items() if name in LAYERS}
        skipped = tuple(name for name in choices.skip_layers if name in LAYERS)
        choices = dataclasses.replace(choices, layers=literal, skip_layers=skipped, amct_rules=True)
    assume(not (amct_rules and is_channel_wise_linear(choices)))
    wanted = {name: expected(choices, name) for name in LAYERS}
    if not any(layer.retrain_enable for layer in wanted.values()):
        with pytest.raises(ValueError, match="No layer retrain enabled"):
            choices.resolve(LAYERS)
        return
    config = choices.resolve(LAYERS)
    assert (config.batch_num, config.fakequant_precision_mode) == (choices.batch_num, choices.fakequant_precision_mode)
    for name, layer in wanted.items():
        weight = layer.retrain_weight_config
        by_default = not isinstance(LAYERS[name], nn.Linear)
        can_be = by_default or (layer.retrain_enable and not amct_rules)
        channel_wise = by_default if weight.channel_wise is None else can_be and weight.channel_wise
        filled = dataclasses.replace(weight, channel_wise=channel_wise)
        assert config[name] == dataclasses.replace(layer, retrain_weight_config=filled)
    assert RetrainConfig.from_dict(json.loads(config.to_text())) == config
