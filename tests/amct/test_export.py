"""The last line of a script for AMCT: it needs the record of an evaluation pass, and writes two files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import amct_lightning as amct


def test_the_last_line_of_a_script_asks_for_an_evaluation_pass_and_then_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4)
    amct.create_quant_retrain_config("config.json", model, x)
    qat = amct.create_quant_retrain_model("config.json", model, "record.txt", x)
    qat.train()(x)
    last_line = ("config.json", qat, "record.txt", "out/net", x, ["x"], ["y"], {"x": {0: "n"}, "y": {0: "n"}})
    with pytest.raises(RuntimeError, match=r"record in 'record\.txt' is empty.*model\.eval\(\); model\(input\)"):
        amct.save_quant_retrain_model(*last_line)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    qat.eval()(x)
    assert amct.save_quant_retrain_model(*last_line) is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "net_deploy_model.onnx",
        "net_fake_quant_model.onnx",
    ]


def test_a_path_that_ends_with_a_slash_gives_names_without_a_prefix(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4)
    config, record = str(tmp_path / "config.json"), str(tmp_path / "record.txt")
    amct.create_quant_retrain_config(config, model, x)
    qat = amct.create_quant_retrain_model(config, model, record, x)
    qat.train()(x)
    qat.eval()(x)
    amct.save_quant_retrain_model(config, qat, record, f"{tmp_path}/out/", x)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["deploy_model.onnx", "fake_quant_model.onnx"]
