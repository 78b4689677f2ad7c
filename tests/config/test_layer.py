"""A layer's settings check themselves when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from amct_lightning.config import DataConfig, LayerConfig, WeightConfig


def test_defaults_are_those_of_amct():
    layer = LayerConfig()
    assert layer.retrain_enable is True
    assert layer.retrain_data_config == DataConfig("ulq_quantize", None, None, None, "INT8")
    assert layer.retrain_weight_config == WeightConfig("arq_retrain", None, "INT8")


@pytest.mark.parametrize(("dst_type", "bits"), [("INT4", 4), ("INT8", 8), ("INT16", 16)])
def test_num_bits_follow_the_data_type(dst_type: str, bits: int):
    assert DataConfig(dst_type=dst_type).num_bits == bits


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().dst_type = "INT4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "kind", "key"),
    [
        ({"algo": "ifmr"}, ValueError, "algo"),
        ({"algo": None}, TypeError, "algo"),
        ({"clip_max": 1, "clip_min": -1.0}, TypeError, "clip_max"),
        ({"clip_max": True, "clip_min": -1.0}, TypeError, "clip_max"),
        ({"clip_max": 1.0, "clip_min": -1}, TypeError, "clip_min"),
        ({"clip_max": 0.0, "clip_min": -1.0}, ValueError, "clip_max"),
        ({"clip_max": 1.0, "clip_min": 0.0}, ValueError, "clip_min"),
        ({"clip_max": 1.0, "clip_min": -0.0}, ValueError, "clip_min"),
        ({"clip_max": 1.0}, ValueError, "clip_max"),
        ({"clip_min": -1.0}, ValueError, "clip_min"),
        ({"clip_max": math.nan, "clip_min": -1.0}, ValueError, "clip_max"),
        ({"clip_max": 1.0, "clip_min": math.nan}, ValueError, "clip_min"),
        ({"clip_max": math.inf, "clip_min": -1.0}, ValueError, "clip_max"),
        ({"clip_max": 1.0, "clip_min": -math.inf}, ValueError, "clip_min"),
        ({"fixed_min": 1}, TypeError, "fixed_min"),
        ({"dst_type": 8}, TypeError, "dst_type"),
        ({"dst_type": "FP16"}, ValueError, "dst_type"),
    ],
)
def test_a_forbidden_activation_setting_is_named(settings: dict[str, Any], kind: type[Exception], key: str):
    with pytest.raises(kind, match=rf"^DataConfig\.{key} ") as caught:
        DataConfig(**settings)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("settings", "kind", "key"),
    [
        ({"algo": "arq_quantize"}, ValueError, "algo"),
        ({"algo": 1}, TypeError, "algo"),
        ({"channel_wise": 1}, TypeError, "channel_wise"),
        ({"dst_type": "INT16"}, ValueError, "dst_type"),
        ({"dst_type": ["INT8"]}, TypeError, "dst_type"),
    ],
)
def test_a_forbidden_weight_setting_is_named(settings: dict[str, Any], kind: type[Exception], key: str):
    with pytest.raises(kind, match=rf"^WeightConfig\.{key} "):
        WeightConfig(**settings)


def test_a_message_shows_what_was_found_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"must be 'INT4' or 'INT8' or 'INT16', found 'INT32' \(str\)\.$"):
        DataConfig(dst_type="INT32")


@pytest.mark.parametrize("pair", [("INT4", "INT4"), ("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4")])
def test_the_hardware_runs_these_type_pairs(pair: tuple[str, str]):
    layer = LayerConfig(True, DataConfig(dst_type=pair[0]), WeightConfig(dst_type=pair[1]))
    widths = {"INT4": 4, "INT8": 8, "INT16": 16}
    assert (layer.retrain_data_config.num_bits, layer.retrain_weight_config.num_bits) == tuple(widths[p] for p in pair)


@pytest.mark.parametrize("pair", [("INT4", "INT8"), ("INT16", "INT4")])
def test_other_type_pairs_are_refused(pair: tuple[str, str]):
    with pytest.raises(ValueError, match=f"is {pair[0]} while .* is {pair[1]}; .* INT16 with INT8"):
        LayerConfig(True, DataConfig(dst_type=pair[0]), WeightConfig(dst_type=pair[1]))


@pytest.mark.parametrize(
    "arguments", [(1,), (True, {"dst_type": "INT8"}), (True, DataConfig(), None), (True, WeightConfig())]
)
def test_a_layer_refuses_parts_of_the_wrong_type(arguments: tuple[Any, ...]):
    with pytest.raises(TypeError, match=r"^LayerConfig\.retrain_"):
        LayerConfig(*arguments)


@pytest.mark.parametrize("clips", [(1e300, -1.0), (1.0, -1e39), (1e-9, -1e-9), (float("inf"), -1.0)])
def test_clips_that_give_no_float32_scale_are_refused(clips: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"DataConfig\.clip_(max|min)"):
        DataConfig(clip_max=clips[0], clip_min=clips[1])
