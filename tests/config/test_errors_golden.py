"""Unusual arguments of ``create_quant_retrain_config``: the outcome is AMCT's, and an error names the culprit.

What AMCT says of the content of a JSON file is compared in ``test_golden.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from amct_lightning import RetrainConfig, create_quant_retrain_config, create_quant_retrain_model, prepare_qat
from tests.config.test_golden import ERRORS
from tests.golden.models import MODELS

GROUP = "create_quant_retrain_config/"
CASES = {name.removeprefix(GROUP): case for name, case in ERRORS.items() if name.startswith(GROUP)}

ARQ = "retrain_weight_quant_config: {{ arq_retrain: {{ {} }} }}"
ULQ = "retrain_data_quant_config: {{ ulq_quantize: {{ {} }} }}"
CONV1 = f'override_layer_configs: {{ layer_name: "conv1" {ARQ.format("")} }}\n'

SIMPLE_CONFIGS: dict[str, tuple[str, str | None]] = {
    # case: (the simple configuration, what the message says, None if there is no error)
    "cfg_unknown_field": ("foo: 3", "line 1: .*no field 'foo'; its fields are batch_num, "),
    "cfg_skip_unknown_layer": ('skip_layers: "nope"', "cannot skip layer 'nope'.* can be quantized: 'conv1', 'conv2'"),
    "cfg_skip_bad_type": ('skip_layer_types: "AvgPool2d"', "cannot skip layer type 'AvgPool2d'.* Conv1d, Conv2d"),
    "cfg_quant_skip_bad_type": ('quant_skip_types: "ReLU"', "cannot skip layer type 'ReLU'.* Conv1d, Conv2d"),
    "cfg_override_unknown_empty": ('override_layer_configs: { layer_name: "nope" }', None),
    "cfg_override_repeated": (CONV1 * 2, r"override_layer_configs: repeated for \['conv1'\]"),
    "cfg_override_no_name": ("override_layer_configs: { }", None),
    "cfg_clip_max_only": (
        ULQ.format("clip_max_min: { clip_max: 1 }"),
        r"ulq_quantize\.clip_max_min: clip_max and clip_min are both required, found clip_max",
    ),
    "cfg_clip_min_positive": (
        ULQ.format("clip_max_min: { clip_max: 1 clip_min: 0.5 }"),
        r"ulq_quantize\.clip_min' must be .* below 0, found 0\.5",
    ),
    "cfg_a4w4": (ULQ.format("dst_type: INT4") + ARQ.format("dst_type: INT4"), None),
    "cfg_w16": (ARQ.format("dst_type: INT16"), r"arq_retrain\.dst_type' must be 'INT4' or 'INT8', found 'INT16'"),
    "cfg_bad_enum": (ARQ.format("dst_type: INT2"), "line 1: .*'INT2' must be INT4 or INT8 or INT16"),
    "cfg_batch_num_0": ("batch_num: 0", "key 'batch_num' must be at least 1, found 0"),
    "cfg_batch_num_neg": ("batch_num: -1", "line 1: .*batch_num: -1"),
    "cfg_skip_everything": (
        'quant_skip_types: "Conv2d" quant_skip_types: "Linear"',
        r"No layer retrain enabled: .*'conv1', 'conv2', 'fc'",
    ),
    "cfg_precision_default": ("fakequant_precision_mode: DEFAULT", "line 1: .*'DEFAULT' must be FORCE_FP16_QUANT"),
    "cfg_int4_odd_cin": (ARQ.format("dst_type: INT4"), None),
}
ACCEPTED_HERE = {"cfg_a4w4"}
"""AMCT refuses INT4 activations in this form and takes them in JSON."""

ARGUMENTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "model_not_module": ({"model": "resnet"}, "argument model must be"),
    "config_defination_int": (
        {"config_defination": 7},
        r"argument config_defination must be .*str.* got <class 'int'>",
    ),
    "input_numpy": ({"input_data": np.ones((2, 3, 8, 8))}, r"must be tuple or torch\.Tensor! Got ndarray"),
    "input_tensor_ok": ({}, None),
    "config_dir_missing": ({"config_file": "new/config.json"}, None),
    "config_exists": ({"config_file": "old.json"}, None),
    "already_quantized": ({"model": "quantized"}, r"quantized already \(conv1, conv2, fc\)"),
    "cfg_missing": ({"config_defination": "none.cfg"}, r"No such config file; .*none\.cfg"),
}


def outcome(folder: Path, **arguments: Any) -> str:
    """Call the function for the base model in a folder and give the text of the file it writes."""
    model = MODELS["cnn_bn_relu"]()
    x = torch.randn(2, 3, 8, 8)
    if arguments.get("model") == "quantized":
        arguments["model"] = prepare_qat(model, None, x)
    for name in ("config_file", "config_defination"):
        if isinstance(arguments.get(name), str):
            arguments[name] = str(folder / arguments[name])
    arguments = {"config_file": str(folder / "config.json"), "model": model, "input_data": x} | arguments
    create_quant_retrain_config(**arguments)
    return Path(arguments["config_file"]).read_text()


def test_every_recorded_case_is_covered():
    assert set(CASES) == set(SIMPLE_CONFIGS) | set(ARGUMENTS)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, tmp_path: Path):
    (tmp_path / "old.json").write_text("old")
    arguments, message = ARGUMENTS[case]
    if message is None:
        assert CASES[case]["outcome"] == "no_exception"
        assert outcome(tmp_path, **arguments).startswith("{")
        return
    with pytest.raises(Exception, match=message) as caught:
        outcome(tmp_path, **arguments)
    assert type(caught.value).__name__ == CASES[case]["exception_type"]


@pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4", "ignore:.*holds no settings")
@pytest.mark.parametrize("case", SIMPLE_CONFIGS)
def test_simple_configurations(case: str, tmp_path: Path):
    simple = tmp_path / "simple.cfg"
    text, message = SIMPLE_CONFIGS[case]
    simple.write_text(text)
    if message is None:
        assert (CASES[case]["outcome"] == "raises") == (case in ACCEPTED_HERE)
        written = outcome(tmp_path, config_defination="simple.cfg")
        assert written == CASES[case].get("observed", {"config": written})["config"]
        return
    with pytest.raises(Exception, match=message) as caught:
        outcome(tmp_path, config_defination="simple.cfg")
    assert type(caught.value).__name__ == CASES[case]["exception_type"]
    assert str(simple) in str(caught.value)
    assert not (tmp_path / "config.json").exists()


def test_a_configuration_without_a_version_is_refused_whatever_came_before(tmp_path: Path):
    """AMCT accepts one after a simple configuration was read in the same process."""
    assert ERRORS["state_leak/version_check_depends_on_history"]["outcome"] == "no_exception"
    (tmp_path / "simple.cfg").write_text("batch_num: 2")
    raw = json.loads(outcome(tmp_path, config_defination="simple.cfg"))
    del raw["version"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"config\.json: must have the key 'version'"):
        RetrainConfig.from_json(tmp_path / "config.json")


def test_a_configuration_of_another_model_is_refused(tmp_path: Path):
    config = RetrainConfig.default(nn.Sequential(nn.Linear(8, 2)), torch.ones(1, 8))
    config.to_json(tmp_path / "config.json")
    arguments = str(tmp_path / "config.json"), MODELS["cnn_bn_relu"](), str(tmp_path / "record.txt")
    with pytest.raises(Exception, match=r"unsupported layer '0' in .*config\.json") as caught:
        create_quant_retrain_model(*arguments, torch.randn(2, 3, 8, 8))
    assert type(caught.value).__name__ == ERRORS["create_quant_retrain_model/no_param_device"]["exception_type"]
