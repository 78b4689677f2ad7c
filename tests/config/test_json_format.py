"""Reading a file never surprises: a configuration, or an error that names file, layer and key."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amct_lightning.config import RetrainConfig
from amct_lightning.files import atomic
from tests.config.conftest import full_raw
from tests.config.strategies import JSON_VALUES, retrain_configs


@st.composite
def damaged_configs(draw: st.DrawFn) -> bytes:
    """JSON content in which one value, somewhere, was replaced by any JSON value, or the bytes were cut."""
    node: Any = full_raw()
    root = node
    keys = [key for key in node if isinstance(node[key], dict)]
    for _ in range(draw(st.integers(0, 2))):
        node = node[draw(st.sampled_from(keys))]
        keys = [key for key in node if isinstance(node[key], dict)]
        if not keys:
            break
    node[draw(st.sampled_from([*node, "foo"]))] = draw(JSON_VALUES)
    data = json.dumps(root).encode()
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@given(config=retrain_configs())
def test_any_configuration_survives_the_way_through_text(config: RetrainConfig):
    text = config.to_text()
    again = RetrainConfig.from_dict(json.loads(text))
    assert again == config
    assert list(again) == list(config)
    assert again.to_text() == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(), damaged_configs()))
def test_any_bytes_give_a_configuration_or_a_plain_error(data: bytes, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    try:
        RetrainConfig.from_json(path)
    except (ValueError, TypeError, OSError) as error:
        assert str(error).startswith(str(path))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"version":' + b"9" * 5000 + b"}",
        b'{"version":1,"batch_num":1,"x":' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=["not UTF-8", "deep list", "deep object", "huge integer", "deep value"],
)
def test_hostile_content_is_a_value_error_that_names_the_file(data: bytes, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json"):
        RetrainConfig.from_json(path)


def test_a_byte_order_mark_is_accepted(raw: dict[str, Any], tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(raw).encode())
    assert list(RetrainConfig.from_json(path)) == ["conv1", "conv2", "fc"]


def test_an_error_names_file_layer_and_key(raw: dict[str, Any], write):
    raw["conv1"]["retrain_data_config"].update(clip_max=0.0, clip_min=-1.0)
    path = write(raw)
    message = f"{path}: layer 'conv1', key 'retrain_data_config.clip_max' must be a finite number above 0"
    with pytest.raises(ValueError, match="clip_max") as caught:
        RetrainConfig.from_json(path)
    assert str(caught.value).startswith(message)
    assert "found 0.0 (float)" in str(caught.value)


def test_malformed_json_names_file_and_position(write):
    with pytest.raises(json.JSONDecodeError, match=r"config\.json.*line 1 column 3") as caught:
        RetrainConfig.from_json(write("{ not json"))
    assert (caught.value.lineno, caught.value.colno) == (1, 3)


def test_repeated_keys_are_listed_at_any_depth(write):
    text = '{"version":1,"batch_num":1,"version":1,"a":{"retrain_enable":true,"b":{"x":1,"x":2}}}'
    with pytest.raises(ValueError, match=r"\['x', 'version'\]"):
        RetrainConfig.from_json(write(text))


def test_of_very_many_repeated_keys_a_few_are_listed(write):
    pairs = ",".join(f'"k{number}":1,"k{number}":1' for number in range(100_000))  # squared, this never ends
    with pytest.raises(ValueError, match=r"\['k0', .* and 99992 more\]"):
        RetrainConfig.from_json(write(f"{{{pairs}}}"))


def test_layers_alike_are_checked_once_and_equal_looking_values_of_other_types_are_still_refused(raw):
    raw["conv2"] = copy.deepcopy(raw["conv1"])
    config = RetrainConfig.from_dict(raw)
    assert config["conv1"] is config["conv2"]
    raw["conv3"] = raw["conv1"] | {"retrain_enable": 1}
    with pytest.raises(TypeError, match=r"layer 'conv3', key 'retrain_enable' must be true or false, found 1"):
        RetrainConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        (None, "retrain_enabled", "retrain_enable"),
        ("retrain_data_config", "clipmax", "clip_max"),
        ("retrain_weight_config", "channelwise", "channel_wise"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(
    raw: dict[str, Any], section: str | None, key: str, suggestion: str
):
    (raw["conv1"][section] if section else raw["conv1"])[key] = True
    with pytest.raises(ValueError, match=rf"{key}' is not known .*Did you mean '{suggestion}'"):
        RetrainConfig.from_dict(raw)


@pytest.mark.parametrize("key", ["regular_prune_enable", "regular_prune_config"])
def test_prune_keys_have_their_own_message(raw: dict[str, Any], key: str):
    raw["conv1"][key] = False
    with pytest.raises(ValueError, match=rf"key '{key}' is not expected.*does not prune"):
        RetrainConfig.from_dict(raw)


@pytest.mark.parametrize("key", ["clip_max", "fixed_min", "dst_type"])
def test_null_is_not_a_default(raw: dict[str, Any], key: str):
    raw["conv1"]["retrain_data_config"][key] = None
    with pytest.raises(TypeError, match=f"'retrain_data_config.{key}' must not be null"):
        RetrainConfig.from_dict(raw)


@pytest.mark.parametrize("layers", [{}, {"fc": {}}, {"fc": {"retrain_enable": False}, "conv1": {}}])
def test_a_file_must_enable_a_layer_in_so_many_words(layers: dict[str, Any]):
    with pytest.raises(ValueError, match="No layer retrain enabled"):
        RetrainConfig.from_dict({"version": 1, "batch_num": 1, **layers})


def test_an_unstated_flag_means_enabled_once_another_layer_states_it():
    raw = {"version": 1, "batch_num": 1, "conv1": {"retrain_enable": True}, "fc": {}}
    assert RetrainConfig.from_dict(raw)["fc"].retrain_enable is True


def test_booleans_count_as_integers_and_are_written_as_integers(raw: dict[str, Any]):
    config = RetrainConfig.from_dict({**raw, "version": True, "batch_num": True})
    assert config.to_text().startswith('{\n    "version":1,\n    "batch_num":1,')


def test_a_layer_name_must_be_a_string(raw: dict[str, Any]):
    with pytest.raises(TypeError, match=r"layer name must be a string, found 3 \(int\)"):
        RetrainConfig.from_dict({**raw, 3: raw["fc"]})


def test_writing_creates_folders_and_reads_back(raw: dict[str, Any], tmp_path: Path):
    config = RetrainConfig.from_dict(raw)
    config.to_json(tmp_path / "new" / "config.json")
    assert RetrainConfig.from_json(tmp_path / "new" / "config.json") == config


def test_overwriting_a_file_is_logged(raw: dict[str, Any], write, caplog: pytest.LogCaptureFixture):
    path = write("old")
    with caplog.at_level(logging.WARNING, logger="amct_lightning.config"):
        RetrainConfig.from_dict(raw).to_json(path)
    assert str(path) in caplog.text
    assert RetrainConfig.from_json(path)


def test_a_failed_write_leaves_the_old_file(raw: dict[str, Any], write, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = write("old")
    monkeypatch.setattr(atomic.os, "open", refuse)  # an unwritable folder, also for root
    with pytest.raises(PermissionError):
        RetrainConfig.from_dict(raw).to_json(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
