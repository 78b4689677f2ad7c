"""The language model for servers: the script, its YAML twin, and the command that writes the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from amct_lightning.cli import main
from tests.examples.running import command, fit, run

SHORT = ("--epochs", "1", "--qat-epochs", "1")
WEIGHTS = "quant_model_weights.safetensors"


def test_a_decoder_is_trained_saved_and_read_back_and_its_twin_and_the_command_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    printed = run(command("serving.py", out, *SHORT))
    rows = dict(re.findall(r"│ (float|W8A8, trained|W8A8, as served in bfloat16) +│ +(\d+\.\d+) │", printed))
    assert float(rows["W8A8, trained"]) < float(rows["float"]) * 1.02
    assert float(rows["W8A8, as served in bfloat16"]) == pytest.approx(float(rows["W8A8, trained"]), rel=5e-3)
    assert "The server computes what the model does." in printed
    assert "8192 of 8192 rows of scores equal" in printed
    served = sorted(file.name for file in (out / "served").iterdir())
    assert {"config.json", "quant_model_description.json", WEIGHTS, "tokenizer.json"} <= {*served}

    fit(monkeypatch, tmp_path, "serving_float", "--trainer.max_epochs=1")
    fit(monkeypatch, tmp_path, "serving", "--trainer.max_epochs=1")
    twin = tmp_path / "runs" / "serving_yaml"
    assert (twin / "w8a8.record.txt").read_bytes() == (out / "w8a8.record.txt").read_bytes()

    export = ["export", str(twin / "w8a8.ckpt"), "--model", "examples/serving.yaml", "--submodule", "model"]
    capsys.readouterr()
    to_servers = ["--form", "ascend_v1", "--hf-source", str(out / "float_network"), "--output", str(twin / "served")]
    assert main([*export, *to_servers, "--verify", "2", "--input-shape", "input_ids=2,8:int64"]) == 0
    said = capsys.readouterr().out
    assert "Written: " in said and "The server computes what the model does." in said
    assert sorted(file.name for file in (twin / "served").iterdir()) == served
    ours, theirs = load_file(out / "served" / WEIGHTS), load_file(twin / "served" / WEIGHTS)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert json.loads((twin / "served" / "config.json").read_text())["model_type"] == "qwen2"

    for wrong, message in (
        ([*to_servers[:2], "qdq"], "--form ascend_v1 is written alone"),
        ([*to_servers, "--opset", "13"], "--opset: for ONNX files only"),
        (["--form", "qdq", "--hf-source", "x"], "--hf-source goes with --form ascend_v1 only"),
        ([*to_servers[:2], "--output", str(twin)], "holds other files and no quant_model_description.json"),
    ):
        assert main([*export, *wrong]) != 0
        assert message in capsys.readouterr().err
    assert main([*export, "--form", "qdq", "--input-shape", "input_ids=2,8:int64"]) != 0
    assert "which no ONNX file has: qdq" in capsys.readouterr().err
