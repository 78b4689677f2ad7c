"""What was written before files of the package moved is read as ever, and training goes on from it."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch

from amct_lightning import (
    QuantRecord,
    RetrainConfig,
    create_quant_retrain_model,
    load_qat_checkpoint,
    restore_quant_retrain_model,
)
from amct_lightning.run_report import write_report
from tests.written_before.network import CHOICES_THEN, FILES, Net, batches, fit

LAST = FILES / "epoch2.ckpt"


def last_weights() -> dict[str, torch.Tensor]:
    return torch.load(LAST, weights_only=True)["state_dict"]


@pytest.mark.parametrize("epoch", [0, 1], ids=["in the middle of the calibration", "after it"])
def test_a_training_goes_on_to_where_it_went_then(epoch: int, tmp_path: Path) -> None:
    model = fit(tmp_path, 3, FILES / f"epoch{epoch}.ckpt")
    torch.testing.assert_close(model.state_dict(), last_weights(), rtol=1e-6, atol=1e-7)
    assert QuantRecord.load(tmp_path / "record.txt").allclose(QuantRecord.load(FILES / "epoch2.record.txt"), 1e-6)


def test_a_training_from_the_beginning_still_goes_there(tmp_path: Path) -> None:
    model = fit(tmp_path, 3, config=CHOICES_THEN)
    torch.testing.assert_close(model.state_dict(), last_weights(), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_becomes_a_model_with_its_record() -> None:
    model = load_qat_checkpoint(Net(), LAST)
    assert all(torch.equal(value, last_weights()[name]) for name, value in model.state_dict().items())
    assert QuantRecord.from_model(model) == QuantRecord.load(FILES / "epoch2.record.txt")


def test_the_report_of_a_run_is_made(tmp_path: Path) -> None:
    for name in ("epoch2.ckpt", "epoch2.record.txt", "metrics.csv", "quant_monitor.csv"):
        shutil.copy(FILES / name, tmp_path)
    text = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert all(layer in text for layer in ("body.0", "left", "right"))


def test_configuration_and_record_are_written_as_then(tmp_path: Path) -> None:
    RetrainConfig.from_json(FILES / "config.json").to_json(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == (FILES / "config.json").read_bytes()
    QuantRecord.load(FILES / "plain.txt").save(tmp_path / "record.txt")
    assert (tmp_path / "record.txt").read_bytes() == (FILES / "plain.txt").read_bytes()


@pytest.mark.parametrize("file", ["plain.pt", "amct.pt"], ids=["own names", "AMCT's names"])
def test_a_state_dict_of_the_plain_interface_is_restored(file: str, tmp_path: Path) -> None:
    x, record = next(iter(batches()))[0], tmp_path / "record.txt"
    config = str(FILES / "config.json")
    model = restore_quant_retrain_model(config, Net(), str(record), x, str(FILES / file))
    model.eval()(x)
    assert record.read_bytes() == (FILES / "plain.txt").read_bytes()
    fresh = create_quant_retrain_model(config, Net(), str(record), x)
    assert list(fresh.state_dict()) == list(torch.load(FILES / "plain.pt", weights_only=True))


@pytest.mark.parametrize(
    "path",
    [
        "amct_lightning.QuantSchedule",
        "amct_lightning.ascend.AscendClusterEnvironment",
        "amct_lightning.ascend.NPUPrecision",
        "amct_lightning.ascend.accelerator.NPUAccelerator",
        "amct_lightning.ascend.cluster.AscendClusterEnvironment",
        "amct_lightning.ascend.fabric.AscendFabricStrategy",
        "amct_lightning.ascend.fsdp.AscendFSDPStrategy",
        "amct_lightning.ascend.precision.NPUPrecision",
        "amct_lightning.ascend.strategy.AscendStrategy",
        "amct_lightning.callbacks.AtomicCheckpointIO",
        "amct_lightning.callbacks.monitor.QuantMonitor",
        "amct_lightning.callbacks.quant_retrain.QuantRetrainCallback",
        "amct_lightning.callbacks.schedule.QuantSchedule",
        "amct_lightning.cli.QuantCLI",
    ],
)
def test_a_class_path_of_a_configuration_is_found(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
