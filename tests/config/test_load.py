"""Every form of a configuration comes in through one function, told apart by what it is."""

from __future__ import annotations

import json
from collections import UserDict, UserList
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning.config import LayerConfig, QuantChoices, RetrainConfig, config_source, load_config
from tests.config.conftest import full_raw

JSON = json.dumps(full_raw())
SIMPLE = 'batch_num: 7 skip_layers: "fc"'
YAML = "batch_num: 7\nskip_layers: [fc]"


def test_objects_are_returned_as_they_are():
    for config in (RetrainConfig(layers={"fc": LayerConfig()}), QuantChoices(batch_num=2)):
        assert load_config(config) is config


def test_none_chooses_the_defaults():
    assert load_config(None) == QuantChoices()


def test_a_dict_with_a_version_is_json_content_and_another_one_choices():
    assert load_config(full_raw()) == RetrainConfig.from_dict(full_raw())
    assert load_config({"batch_num": 7}) == QuantChoices(batch_num=7)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", JSON, RetrainConfig.from_dict(full_raw())),
        ("a.JSON", JSON, RetrainConfig.from_dict(full_raw())),
        ("a.conf", f"\n {JSON}", RetrainConfig.from_dict(full_raw())),
        ("a", JSON, RetrainConfig.from_dict(full_raw())),
        ("a.cfg", SIMPLE, QuantChoices(batch_num=7, skip_layers=("fc",), amct_rules=True)),
        ("a.prototxt", SIMPLE, QuantChoices(batch_num=7, skip_layers=("fc",), amct_rules=True)),
        ("a.yaml", YAML, QuantChoices(batch_num=7, skip_layers=("fc",))),
        ("a.yml", YAML, QuantChoices(batch_num=7, skip_layers=("fc",))),
        ("a.yml", JSON.replace('"version": 1, ', ""), None),
    ],
)
def test_a_file_is_read_as_its_suffix_or_content_says(name: str, text: str, expected: Any, tmp_path: Path):
    path = tmp_path / name
    path.write_text(text)
    if expected is None:
        with pytest.raises(ValueError, match=r"a\.yml: key 'conv1' is not known"):
            load_config(path)
        return
    assert load_config(path) == expected == load_config(str(path))


@pytest.mark.parametrize("name", ["a.json", "a.cfg", "a.yaml", "a.txt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"No such config file; .*{name}"):
        load_config(tmp_path / name)


def test_a_folder_is_an_os_error(tmp_path: Path):
    with pytest.raises(OSError, match=str(tmp_path)):
        load_config(tmp_path)


@pytest.mark.parametrize("config", [3, ["a.json"], b"a.json", LayerConfig()])
def test_other_types_are_refused(config: Any):
    with pytest.raises(TypeError, match=r"^A configuration must be a RetrainConfig.*found"):
        load_config(config)


def foreign(value: Any) -> Any:
    """Give dicts and lists as classes of the same kinds that are not dict and list, as OmegaConf has them."""
    if isinstance(value, dict):
        return UserDict({key: foreign(item) for key, item in value.items()})
    return UserList(map(foreign, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(
    "content",
    [
        full_raw(),
        {"skip_layers": ["head", "net.0"], "types": {"Linear": {"weights": {"dst_type": "INT4"}}}},
        {"batch_num": 2, "layers": {"a": {"activations": {"clip_max": 1, "clip_min": -1}}}},
    ],
)
def test_mappings_and_lists_of_any_class_mean_what_dicts_and_lists_do(content: dict[str, Any]):
    loaded = load_config(foreign(content))
    assert loaded == load_config(content)
    assert not isinstance(loaded, QuantChoices) or type(loaded.skip_layers) is tuple


@pytest.mark.parametrize(
    ("preset", "data", "weight"),
    [("INT8", 8, 8), ("int8", 8, 8), ("A8W8", 8, 8), ("a16w8", 16, 8), ("A8W4", 8, 4), ("a4w4", 4, 4)],
)
def test_a_preset_gives_every_layer_its_types(preset: str, data: int, weight: int):
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    config = RetrainConfig.from_choices(preset, model, torch.ones(1, 2, 3, 3))
    bits = {(x.retrain_data_config.num_bits, x.retrain_weight_config.num_bits) for x in config.values()}
    assert (len(config), bits) == (2, {(data, weight)})


def test_what_is_neither_a_preset_nor_a_file_is_told_with_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    presets = r"\(INT8, A8W8, A16W8, A8W4, A4W4\)"
    with pytest.raises(FileNotFoundError, match=rf"preset {presets} nor a config file\. Did you mean 'A4W4'.*'a4w5'"):
        load_config("a4w5")
    (tmp_path / "a4w5").write_text(SIMPLE)
    assert load_config("a4w5").batch_num == 7


def test_a_file_that_is_called_like_a_preset_is_meant_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "INT8").write_text(SIMPLE)
    assert [load_config(config).batch_num for config in ("INT8", "./INT8", Path("INT8"))] == [1, 7, 7]


def test_types_may_be_written_in_small_letters():
    small = {"activations": {"dst_type": "int16"}, "layers": {"a": {"activations": {"dst_type": "int8"}}}}
    assert load_config(small) == load_config(json.loads(json.dumps(small).replace('"int', '"INT')))


def test_the_source_is_the_path_or_a_general_word():
    assert config_source(Path("qat/my.cfg")) == "qat/my.cfg"
    assert config_source({"batch_num": 1}) == "config"


def test_choices_are_worked_out_for_a_model(tmp_path: Path):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(1, 2)
    path = tmp_path / "my.yaml"
    path.write_text("skip_layers: [0]")
    by_file = RetrainConfig.from_choices(path, model, x)
    assert by_file == RetrainConfig.from_choices({"skip_layers": ["0"]}, model, x)
    assert by_file == RetrainConfig.from_choices(QuantChoices(skip_layers=("0",)), model, x)
    assert {name: layer.retrain_enable for name, layer in by_file.items()} == {"0": False, "2": True}


def test_a_mistake_in_a_file_is_found_before_the_model_runs(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text("skip: [0]")
    with pytest.raises(ValueError, match=r"my\.yaml: key 'skip' is not known"):
        RetrainConfig.from_choices(path, nn.Linear(2, 2), torch.ones(1, 3))
