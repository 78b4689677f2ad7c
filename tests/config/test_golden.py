"""AMCT's own files: read and written back they are the same bytes, and what it refuses is refused here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from amct_lightning.config import RetrainConfig
from tests.config.conftest import GOLDEN, full_raw

CASES = {path.parent.name: json.loads(path.read_text()) for path in GOLDEN.glob("models_data/*/meta.json")}
GENERATED = {name: meta["config_generated"] for name, meta in sorted(CASES.items()) if "config_generated" in meta}
ERRORS = {case["id"]: case for case in json.loads((GOLDEN / "errors.json").read_text())["cases"]}
GROUP = "create_quant_retrain_model/"

STRICTER_HERE = {"layer_unknown_key": ValueError, "clip_nan": ValueError}

DATA, WEIGHT = r"layer 'conv1', key 'retrain_data_config\.", r"layer 'conv1', key 'retrain_weight_config\."
CULPRITS = {
    "json_malformed": "line 1 column 3",
    "json_list": r"must be an object .* found \[\] \(list\)",
    "json_empty_object": "must have the key 'version'",
    "json_duplicate_nested": r"repeated keys \['algo'\]",
    "version_missing": "must have the key 'version'",
    "version_2": r"key 'version' should be 1, found 2",
    "batch_num_missing": "must have the key 'batch_num'",
    "batch_num_neg": "key 'batch_num' must be at least 1, found -2",
    "batch_num_float": r"key 'batch_num' must be an integer, found 1\.0 \(float\)",
    "unknown_layer": "unsupported layer 'nope' .* can be quantized: 'conv1', 'conv2', 'fc'",
    "unknown_top_key_int": r"'foo' is not a valid key; .* found 1 \(int\)",
    "enable_int": r"layer 'conv1', key 'retrain_enable' must be true or false, found 1 \(int\)",
    "enable_str": "layer 'conv1', key 'retrain_enable' must be true or false, found 'true'",
    "layer_unknown_key": "layer 'conv1', key 'foo' is not known",
    "prune_key": "layer 'conv1', key 'regular_prune_enable' is not expected",
    "data_not_dict": "layer 'conv1', key 'retrain_data_config' must be an object .* found 'ulq_quantize'",
    "data_algo_bad": f"{DATA}algo' must be 'ulq_quantize', found 'ifmr'",
    "clip_max_int": rf"{DATA}clip_max' must be a float .* found 1 \(int\)",
    "clip_max_zero": rf"{DATA}clip_max' must be .* above 0, found 0\.0",
    "clip_min_zero": rf"{DATA}clip_min' must be .* below 0, found 0\.0",
    "clip_max_only": f"{DATA}clip_max' comes without clip_min",
    "clip_nan": f"{DATA}clip_max' must be a finite number .* found nan",
    "fixed_min_int": rf"{DATA}fixed_min' must be true or false, found 1 \(int\)",
    "dst_int": rf"{DATA}dst_type' must be 'INT4' or 'INT8' or 'INT16', found 8 \(int\)",
    "a16w16": f"{WEIGHT}dst_type' must be 'INT4' or 'INT8', found 'INT16'",
    "a16w4": f"{DATA}dst_type' is INT16 while that of the weights is INT4",
    "wts_algo_bad": f"{WEIGHT}algo' must be 'arq_retrain' or 'ulq_retrain', found 'arq_quantize'",
    "wts_algo_int": rf"{WEIGHT}algo' must be .* found 1 \(int\)",
    "channel_wise_linear": r"layer 'fc', key 'retrain_weight_config\.channel_wise' must be false",
    "precision_mode_bad": "key 'fakequant_precision_mode' must be 'DEFAULT' or 'FORCE_FP16_QUANT', found 'FP16'",
    "precision_mode_int": r"key 'fakequant_precision_mode' must be .* found 1 \(int\)",
}

TEXTS = {
    "json_malformed": "{ not json",
    "json_list": "[]",
    "json_empty_object": "{}",
    "json_duplicate_nested": json.dumps(full_raw()).replace(
        '"algo": "ulq_quantize"', '"algo": "ulq_quantize", "algo": "ulq_quantize"', 1
    ),
    "json_minimal": '{"version":1,"batch_num":1,"conv1":{"retrain_enable":true}}',
}


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split("/")

    def edit(raw: dict[str, Any]) -> None:
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return edit


def _drop(*paths: str) -> Callable[[dict[str, Any]], None]:
    def edit(raw: dict[str, Any]) -> None:
        for path in paths:
            *parents, last = path.split("/")
            owner = raw
            for parent in parents:
                owner = owner[parent]
            del owner[last]

    return edit


def _data(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["conv1"]["retrain_data_config"].update(settings)


def _weight(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["conv1"]["retrain_weight_config"].update(settings)


def _both(*edits: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda raw: [edit(raw) for edit in edits] and None


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "version_missing": _drop("version"),
    "version_2": _put("version", 2),
    "version_true": _put("version", True),
    "batch_num_missing": _drop("batch_num"),
    "batch_num_neg": _put("batch_num", -2),
    "batch_num_float": _put("batch_num", 1.0),
    "unknown_layer": lambda raw: raw.update(nope=copy.deepcopy(raw["conv1"])),
    "unknown_top_key_int": _put("foo", 1),
    "enable_int": _put("conv1/retrain_enable", 1),
    "enable_str": _put("conv1/retrain_enable", "true"),
    "layer_unknown_key": _put("conv1/foo", 1),
    "prune_key": _put("conv1/regular_prune_enable", False),
    "data_not_dict": _put("conv1/retrain_data_config", "ulq_quantize"),
    "data_algo_bad": _data(algo="ifmr"),
    "clip_max_int": _data(clip_max=1, clip_min=-1.0),
    "clip_max_zero": _data(clip_max=0.0, clip_min=-1.0),
    "clip_min_zero": _data(clip_max=1.0, clip_min=0.0),
    "clip_max_only": _data(clip_max=1.0),
    "clip_nan": _data(clip_max=float("nan"), clip_min=-1.0),
    "fixed_min_int": _data(fixed_min=1),
    "dst_int": _data(dst_type=8),
    "dst_missing": _drop("conv1/retrain_data_config/dst_type", "conv1/retrain_weight_config/dst_type"),
    "a16w16": _both(_data(dst_type="INT16"), _weight(dst_type="INT16")),
    "a16w4": _both(_data(dst_type="INT16"), _weight(dst_type="INT4")),
    "wts_algo_bad": _weight(algo="arq_quantize"),
    "wts_algo_int": _weight(algo=1),
    "channel_wise_linear": _put("fc/retrain_weight_config/channel_wise", True),
    "precision_mode_bad": _put("fakequant_precision_mode", "FP16"),
    "precision_mode_int": _put("fakequant_precision_mode", 1),
}

# About the other arguments or the model, not about the content of the file.
NOT_CONTENT = {
    "config_missing", "config_int", "record_int", "record_exists", "record_is_dir", "model_str", "input_list",
    "no_param_device", "modes",
}  # fmt: skip


def _content(case: str) -> str:
    if case in TEXTS:
        return TEXTS[case]
    raw = full_raw()
    EDITS[case](raw)
    return json.dumps(raw)


def test_every_recorded_case_is_covered():
    recorded = {name.removeprefix(GROUP) for name in ERRORS if name.startswith(GROUP)}
    assert recorded == set(TEXTS) | set(EDITS) | NOT_CONTENT


@pytest.mark.parametrize("case", [*TEXTS, *EDITS])
def test_the_outcome_is_that_of_amct(case: str, write, eligible: dict[str, nn.Module]):
    path = write(_content(case))
    expected = ERRORS[GROUP + case]
    kind = STRICTER_HERE[case].__name__ if case in STRICTER_HERE else expected.get("exception_type")
    if kind is None:
        RetrainConfig.from_json(path).resolve(eligible, str(path))
        return
    with pytest.raises(Exception, match=CULPRITS[case]) as caught:
        RetrainConfig.from_json(path).resolve(eligible, str(path))
    assert type(caught.value).__name__ == kind
    assert str(path) in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"create_quant_retrain_config.*none\.json") as caught:
        RetrainConfig.from_json(tmp_path / "none.json")
    assert type(caught.value).__name__ == ERRORS[f"{GROUP}config_missing"]["exception_type"]


def test_a_path_of_the_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match=r"found 1 \(int\)"):
        RetrainConfig.from_json(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", GENERATED)
def test_generated_files_are_written_back_to_the_byte(case: str):
    config = RetrainConfig.from_dict(json.loads(GENERATED[case]))
    assert config.to_text() == GENERATED[case]


@pytest.mark.parametrize("case", [name for name in GENERATED if CASES[name]["status"] == "ok"])
def test_hand_edited_files_that_amct_trains_are_accepted(case: str):
    raw = json.loads(CASES[case].get("config_used", GENERATED[case]))
    assert RetrainConfig.from_dict(raw).to_dict().keys() == raw.keys()


def test_golden_files_are_present():
    assert len(GENERATED) > 50
