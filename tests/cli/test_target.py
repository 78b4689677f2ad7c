"""The target on the command line and in the YAML of a run."""

from __future__ import annotations

import runpy
import warnings

import pytest
import torch

from amct_lightning import QuantRecord, RetrainConfig, conversion_report, prepare_qat
from tests.cli.conftest import Folder

MODEL = ("config", "--model", "demo_module.Classifier", "--choices", "A8W4")


def test_the_command_refuses_what_the_target_does_not_run(folder: Folder) -> None:
    done = folder(*MODEL, "--target", "950", "-o", "config.json")
    assert done.status != 0
    assert "A8W4: target 950 (Ascend 950PR/950DT) does not run as configured: 'net.4' (Linear, A8W4)" in done.err
    assert "Traceback" not in done.err
    assert not (folder / "config.json").exists()


def test_the_command_writes_what_the_target_runs(folder: Folder) -> None:
    done = folder(*MODEL, "--target", "950", "--on-unsupported", "fallback", "-o", "config.json", "--explain")
    assert done.status == 0
    assert "2 of 2 layers are quantized for target 950 (" in done.out
    assert "INT8 is used for 'net.4'" in done.err
    config = RetrainConfig.from_json(folder / "config.json")
    assert {layer.retrain_weight_config.dst_type for layer in config.values()} == {"INT8"}


def test_the_command_lists_the_targets(folder: Folder) -> None:
    assert folder("config", "--model", "demo_module.Classifier", "--target", "A7").status != 0
    assert "{A2,A3,950,310P,serving,serving_bfloat16,serving_float16}" in folder("config", "--help").out


@pytest.mark.parametrize("target", [950, "950"])
def test_the_yaml_of_a_run_may_leave_out_the_quotes(folder: Folder, target: object) -> None:
    run = folder.run_yaml(quant={"config": "A8W4", "target": target, "on_unsupported": "fallback"})
    assert folder("fit", "--config", run, "--trainer.max_epochs=1", "--quant.record_file=fit.txt").status == 0
    assert {layer.wts_type for layer in QuantRecord.load(folder / "fit.txt").values()} == {"INT8"}


def test_a_run_for_a_target_that_does_not_run_it_ends_before_training(folder: Folder) -> None:
    done = folder("fit", "--config", folder.run_yaml(), "--quant.config=A8W4", "--quant.target=950")
    assert done.status != 0
    assert "target 950" in done.err
    assert not (folder / "record.txt").exists()


@pytest.mark.parametrize("form", ["json", "cfg", "yaml"])
def test_a_configuration_for_servers_has_a_scale_per_output_channel_of_a_linear(folder: Folder, form: str) -> None:
    made = f"made.{form}"
    choices = ("--target", "serving", "--on-unsupported", "fallback", "--format", form, "-o", made)
    done = folder("config", "--model", "demo_module.Classifier", *choices)
    assert done.status == 0, done.err
    assert "'net.0' stays in float" in done.err
    model, x = runpy.run_path("demo_module.py")["Classifier"](), torch.zeros(1, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat = prepare_qat(model, folder / made, x, target="serving", on_unsupported="fallback")
    assert [row.channel_wise for row in conversion_report(qat).rows if row.quantized] == [True]
