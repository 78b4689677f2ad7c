"""Symmetric, per-token and float activations: what choices may say of them, and what AMCT's files may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from amct_lightning import RetrainConfig, prepare_qat
from amct_lightning.commands.choices_text import in_few_words, to_yaml
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig, load_config
from amct_lightning.config.fit import resolve_layers
from amct_lightning.conversion.make_plan import make_plan

X = torch.ones(1, 4)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def data_of(choices: dict[str, Any], *layers: str) -> list[DataConfig]:
    plan = make_plan(network(), load_config(choices), X)
    return [plan.config[layer].retrain_data_config for layer in layers]


def test_choices_name_the_algorithm_for_all_for_types_and_for_layers(tmp_path: Path) -> None:
    (tmp_path / "quant.yaml").write_text("activations: {algo: per_token}\nlayers: {'2': {activations: {algo: none}}}\n")
    by_layer = load_config(str(tmp_path / "quant.yaml")).resolve({"0": nn.Linear(4, 4), "2": nn.Linear(4, 2)})
    assert [by_layer[name].retrain_data_config.algo for name in ("0", "2")] == ["per_token", "none"]
    by_type = data_of({"types": {"Linear": {"activations": {"symmetric": True}}}}, "0", "2")
    assert [(data.algo, data.symmetric) for data in by_type] == [("ulq_quantize", True)] * 2


def test_an_entry_with_another_algorithm_leaves_the_settings_of_clips_at_the_top_behind() -> None:
    top = {"clip_max": 2.0, "clip_min": -2.0, "fixed_min": False, "symmetric": True, "dst_type": "INT16"}
    layers = {"0": {"activations": {"algo": "per_token"}}, "2": {"activations": {"algo": "none"}}}
    assert data_of({"activations": top, "layers": layers}, "0", "2") == [
        DataConfig("per_token", dst_type="INT16"),
        DataConfig("none"),
    ]
    choices = {"activations": {"fixed_min": True}, "layers": {"2": {"activations": {"symmetric": True}}}}
    assert data_of(choices, "2") == [DataConfig(symmetric=True)]


def test_an_entry_gives_a_layer_learned_clips_again() -> None:
    choices = {"activations": {"algo": "per_token"}, "layers": {"2": {"activations": {"algo": None}}}}
    assert data_of(choices, "2") == [DataConfig(fixed_min="propagate")]


WRONG = [
    ({"algo": "lsq"}, "activations.algo' must be 'ulq_quantize' or 'per_token' or 'none', found 'lsq'"),
    ({"symmetric": "yes"}, "activations.symmetric' must be true or false"),
    ({"symmetric": True, "fixed_min": True}, "activations.symmetric' asks for a range around 0, and fixed_min=True"),
    ({"symmetric": True, "fixed_min": "propagate"}, "and fixed_min='propagate' for one from 0 on; leave one of"),
    ({"symmetric": True, "clip_max": 1, "clip_min": -2}, "activations.clip_min' must be -clip_max with symmetric=true"),
    ({"algo": "per_token", "symmetric": True}, "activations.symmetric' is for activations with algo 'ulq_quantize'"),
    ({"algo": "none", "fixed_min": True}, "activations.fixed_min' is for activations with algo 'ulq_quantize', and"),
    ({"algo": "per_token", "clip_max": 1, "clip_min": -1}, "activations.clip_max' is for activations with algo"),
    ({"algo": "none", "dst_type": "INT16"}, "activations.dst_type' is for activations that are quantized, and algo is"),
    ({"algo": "per_token", "dst_type": "INT4"}, "activations.dst_type' is INT4 while that of the weights is INT8"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_contradicts_itself_is_refused_with_its_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        load_config({"activations": settings})
    assert f"config: key '{message}" in str(error.value) or message in str(error.value)


@pytest.mark.parametrize("algo", ["per_token", "none"])
def test_only_a_linear_can_do_without_a_range(algo: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(4, 4), nn.GRU(4, 4))
    with pytest.raises(
        ValueError, match=rf"my.yaml: the algo of activations is '{algo}' for '0' \(Conv1d\), '2' \(GRU"
    ):
        make_plan(model, load_config({"activations": {"algo": algo}}), torch.ones(1, 2, 4), "my.yaml")
    choices = {"activations": {"algo": algo}, "types": {"GRU": {"activations": {"algo": None}}}, "skip_layers": ["0"]}
    assert len(make_plan(model, load_config(choices), torch.ones(1, 2, 4)).layers) == 2


AMCT = [
    (
        {"algo": "per_token"},
        r"key 'retrain_data_config.algo' must be 'ulq_quantize', found 'per_token' \(str\): AMCT's",
    ),
    ({"algo": "none"}, r"key 'retrain_data_config.algo' must be 'ulq_quantize', found 'none'"),
    ({"symmetric": False}, r"key 'retrain_data_config.symmetric' is not expected: AMCT's files have no such"),
    ({"algo": "lsq"}, r"key 'retrain_data_config.algo' must be 'ulq_quantize', found 'lsq' \(str\)\.$"),
]


@pytest.mark.parametrize(("settings", "message"), AMCT, ids=[str(settings) for settings, _ in AMCT])
def test_json_files_refuse_them_with_layer_and_remedy(settings: dict[str, Any], message: str) -> None:
    raw = {"version": 1, "batch_num": 1, "0": {"retrain_enable": True, "retrain_data_config": settings}}
    with pytest.raises(ValueError, match=f"my.json: layer '0', {message}"):
        RetrainConfig.from_dict(raw, "my.json")


@pytest.mark.parametrize("field", ["symmetric: true", "per_token {}"])
def test_simple_files_refuse_them_with_line_and_remedy(tmp_path: Path, field: str) -> None:
    text = f"ulq_quantize {{ {field} }}" if "symmetric" in field else field
    file = tmp_path / "my.cfg"
    file.write_text(f"batch_num: 1\nretrain_data_quant_config {{ {text} }}")
    with pytest.raises(ValueError, match=r"my.cfg: line 2: .*Only choices as YAML or as a dict have '(symm|per_)"):
        load_config(file)


@pytest.mark.parametrize("data", [DataConfig("per_token"), DataConfig("none"), DataConfig(symmetric=True)], ids=str)
def test_no_json_file_is_written_that_means_something_else(tmp_path: Path, data: DataConfig) -> None:
    config = RetrainConfig(layers={"0": LayerConfig(retrain_data_config=data)})
    with pytest.raises(ValueError, match=r"activations of '0' are symmetric, or their algo is not .* no word for that"):
        config.to_json(tmp_path / "my.json")
    assert not list(tmp_path.iterdir())


def test_yaml_in_few_words_means_the_same() -> None:
    layers = {name: nn.Linear(4, 4) for name in "abc"}
    config = RetrainConfig(
        layers={
            "a": LayerConfig(retrain_data_config=DataConfig("per_token")),
            "b": LayerConfig(
                retrain_data_config=DataConfig("none"), retrain_weight_config=WeightConfig(dst_type="INT4")
            ),
            "c": LayerConfig(retrain_data_config=DataConfig(symmetric=True, clip_max=2.0, clip_min=-2.0)),
        }
    ).resolve(layers)
    text = to_yaml(in_few_words(config, layers))
    assert "algo: per_token" in text
    assert load_config(yaml.safe_load(text)).resolve(layers) == config


def test_a_weight_alone_may_be_int4_beside_int16_activations_elsewhere() -> None:
    layer = LayerConfig(retrain_data_config=DataConfig("none"), retrain_weight_config=WeightConfig(dst_type="INT4"))
    assert resolve_layers({"0": layer}, {"0": nn.Linear(4, 4)}, "config", amct_rules=False)["0"].retrain_enable
    choices = {"activations": {"dst_type": "INT16"}, "layers": {"2": {"activations": {"algo": "none"}}}}
    choices["layers"]["2"]["weights"] = {"dst_type": "INT4"}  # type: ignore[index]
    assert data_of(choices, "2") == [DataConfig("none")]


def test_the_device_s_grid_has_no_place_for_activations_without_a_range() -> None:
    with pytest.raises(ValueError, match=r"config gives the activations of '0', '2' no range .*deploy_grid=True"):
        prepare_qat(network(), {"activations": {"algo": "per_token"}}, X, deploy_grid=True)
