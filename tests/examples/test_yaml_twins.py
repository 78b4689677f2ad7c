"""The examples with a YAML twin: they end with their table, and the twin trains the same network to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRecord
from tests.examples.running import command, fit, last_accuracy, printed_accuracies, run


def test_the_recurrent_network_survives_int8_and_its_twin_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run(command("recurrent.py", tmp_path / "out", "--epochs", "6"))
    ((float_accuracy,), (quantized,)) = (printed_accuracies(printed, row) for row in ("FP32", "INT8"))
    assert quantized > max(80, float_accuracy - 4)
    assert list(QuantRecord.load(tmp_path / "out" / "int8.record.txt")) == ["lstm", "head"]

    fit(monkeypatch, tmp_path, "recurrent", "--trainer.max_epochs=6")
    twin = tmp_path / "runs" / "recurrent_yaml"
    assert (twin / "int8.record.txt").read_bytes() == (tmp_path / "out" / "int8.record.txt").read_bytes()
    assert last_accuracy(twin) == pytest.approx(quantized, abs=0.06)


def test_the_tabular_transformer_survives_int8_and_its_twin_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run(command("tabular.py", tmp_path / "out", "--epochs", "6"))
    ((float_accuracy,), (quantized,)) = (printed_accuracies(printed, row) for row in ("FP32", "INT8"))
    assert quantized > max(88, float_accuracy - 3)
    assert len(QuantRecord.load(tmp_path / "out" / "int8.record.txt")) == 13
    monitored = next((tmp_path / "out").rglob("quant_monitor.csv")).read_text()
    assert "blocks.0.attention.1.query" in monitored

    fit(monkeypatch, tmp_path, "tabular", "--trainer.max_epochs=6")
    twin = tmp_path / "runs" / "tabular_yaml"
    assert (twin / "int8.record.txt").read_bytes() == (tmp_path / "out" / "int8.record.txt").read_bytes()
    assert next(twin.rglob("quant_monitor.csv")).read_text() == monitored


def test_the_float_network_teaches_its_int4_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "seed7"
    short = ("--seeds", "1", "--epochs", "8", "--qat-epochs", "3")
    printed = run(command("distill.py", tmp_path / "out", *short))
    float_accuracy, _, plain, distilled = printed_accuracies(printed, "7")
    assert min(plain, distilled) > float_accuracy - 15
    assert list(QuantRecord.load(out / "distilled.record.txt")) == ["0", "3", "6", "11"]
    _assert_the_teacher_is_in_no_checkpoint(out)

    fit(monkeypatch, tmp_path, "distill_teacher", "--trainer.max_epochs=8")
    fit(monkeypatch, tmp_path, "distill", "--trainer.max_epochs=3")
    twin = tmp_path / "runs" / "distill_yaml"
    assert (twin / "distilled.record.txt").read_bytes() == (out / "distilled.record.txt").read_bytes()


def test_a_model_with_dict_batches_is_quantized_from_its_checkpoint_and_its_twin_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "hugging_face"
    printed = run(command("hugging_face.py", out, "--epochs", "4", "--qat-epochs", "1"))
    ((float_accuracy,), (quantized,)) = (printed_accuracies(printed, row) for row in ("FP32", "INT8"))
    assert quantized > max(30, float_accuracy - 4)
    assert len(QuantRecord.load(out / "int8.record.txt")) == 13

    fit(monkeypatch, tmp_path, "hugging_face", "--trainer.max_epochs=1")
    twin = tmp_path / "runs" / "hugging_face_yaml"
    assert (twin / "int8.record.txt").read_bytes() == (out / "int8.record.txt").read_bytes()


def test_one_yaml_run_goes_from_float_to_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(monkeypatch, tmp_path, "digits", "--trainer.max_epochs=8")
    folder = tmp_path / "runs" / "digits_yaml"
    assert last_accuracy(folder) > 85
    assert len(QuantRecord.load(folder / "record.txt")) == 22
    assert (folder / "last.record.txt").read_bytes() == (folder / "record.txt").read_bytes()


def _assert_the_teacher_is_in_no_checkpoint(out: Path) -> None:
    distilled, original = (torch.load(out / f"{name}.ckpt", weights_only=True) for name in ("distilled", "fp32"))
    names = {name for name in distilled["state_dict"] if "_quantizer." not in name}
    assert names == set(original["state_dict"])
    assert len(distilled["amct_lightning"]["teacher"]) == 64
