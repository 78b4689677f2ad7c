"""``amct-lightning export`` and ``verify``: what cannot be exported, and is told."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from amct_lightning import QuantRecord
from tests.cli.conftest import Folder
from tests.cli.export.conftest import MODEL, Trained, images, one_line, written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "demo_module.Words"], "'last.ckpt' is of another architecture"),
        (["--model", "demo_module.Nothing"], "module 'demo_module' has no attribute 'Nothing'"),
        ([*MODEL, "--model.width", "7"], "does not fit"),
        ([*MODEL, "--input-shape", "1,3,8,8"], "does not take an input of [1, 3, 8, 8] float32: RuntimeError: "),
        ([*MODEL, "--submodule", "net.1"], "--submodule net.1: nothing in it is quantized."),
        ([*MODEL, "--submodule", "nett"], "Classifier has no such module; its children are 'net'."),
        ([*MODEL, "--output", "last.ckpt/net"], "'last.ckpt/net_record.txt' cannot be written: Not a directory"),
        ([*MODEL, "--output", "memory://x/net", "--verify", "1"], "a remote file system cannot be verified"),
        ([*MODEL, "--form", "qdg"], "invalid choice: 'qdg'"),
        ([*MODEL, "--opset", "3"], "cannot be translated into ONNX"),
        ([*MODEL, "--record", "other.txt"], "The record in 'other.txt' is not that of this model: 'net.4'"),
        ([*MODEL, "--record", "missing.txt"], "There is no record file 'missing.txt'"),
        ([*MODEL, "--soc-version", "Ascend310P3", "--target", "A2"], "it belongs to target '310P'"),
        ([*MODEL, "--verify", "0"], "--verify 0: must be a number of batches"),
        ([*MODEL, "--batches", "missing.pt"], "--batches missing.pt: there is no such file."),
        ([*MODEL, "--batches", "run.yaml"], "must be a file of torch.save (.pt), .npz, .npy or .safetensors"),
        ([*MODEL, "--batches", "labelled.pt"], "holds 'label', and forward of Classifier takes 'x'"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_message_and_leaves_no_file(
    folder: Folder, trained: Trained, options: list[str], message: str
) -> None:
    trained()
    record = QuantRecord.from_text(folder("record", "extract", "last.ckpt").out)
    QuantRecord({"net.0": record["net.0"]}).save(folder / "other.txt")
    torch.save({"x": images(1), "label": torch.zeros(1)}, folder / "labelled.pt")
    before = written(folder, "*")
    finished = folder("export", "last.ckpt", *options)
    assert finished.status == 2
    assert message in one_line(finished)
    assert "Traceback" not in finished.err
    assert [name for name in written(folder, "*") if name != "__pycache__" and not name.endswith(".pyc")] == before


def test_a_network_that_cannot_be_written_leaves_the_files_of_the_run_before(folder: Folder, trained: Trained) -> None:
    trained()
    (folder / "last_fake_quant_model.onnx").mkdir()
    (folder / "last_record.txt").write_text("old")
    status, _, err = folder("export", "last.ckpt", *MODEL)
    assert status == 2
    assert "'last_fake_quant_model.onnx' is a folder" in err
    assert (folder / "last_record.txt").read_text() == "old"
    assert written(folder) == ["last_fake_quant_model.onnx", "last_record.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint 'last.ckpt'"),
        ({"state_dict": {}}, "was not written in training with QuantRetrainCallback"),
        ("folder", "is a folder, a sharded checkpoint"),
    ],
)
def test_what_is_no_checkpoint_of_a_quantized_model_is_told(folder: Folder, content: Any, message: str) -> None:
    if content == "folder":
        (folder / "last.ckpt").mkdir()
    elif content is not None:
        torch.save(content, folder / "last.ckpt")
    finished = folder("export", "last.ckpt", "--model", "demo_module.Classifier")
    assert finished.status == 2
    assert message in finished.err


def test_a_model_that_was_never_calibrated_is_refused(folder: Folder, trained: Trained) -> None:
    trained("--quant.config.batch_num=50")
    finished = folder("export", "last.ckpt", *MODEL)
    assert finished.status == 2
    assert "the model in 'last.ckpt' cannot be deployed: 2 of 2 quantized layers are not calibrated yet" in finished.err
    assert written(folder) == []  # no file of an export


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_nothing_in_the_checkpoint_or_the_batches_is_executed(folder: Folder, trained: Trained) -> None:
    trained()
    content = torch.load(folder / "last.ckpt", weights_only=False)
    torch.save({**content, "more": Hostile()}, folder / "last.ckpt")
    finished = folder("export", "last.ckpt", *MODEL)
    assert finished.status == 2
    assert "cannot be read without running code from it" in finished.err
    torch.save(content, folder / "last.ckpt")
    torch.save([Hostile()], folder / "batches.pt")
    finished = folder("export", "last.ckpt", *MODEL, "--batches", "batches.pt")
    assert finished.status == 2
    assert "--batches batches.pt: cannot be read as a file of tensors and plain containers" in finished.err
    assert not (folder / "executed").exists()


def test_a_target_that_does_not_run_a_layer_is_told(folder: Folder, trained: Trained) -> None:
    trained("--quant.config=A8W4")
    finished = folder("export", "last.ckpt", *MODEL, "--form", "qdq", "--target", "950")
    assert finished.status == 0
    assert one_line(finished).startswith("warning: target 950 (")
    assert "'net.4' (Linear, A8W4)" in finished.err


@pytest.mark.parametrize(("missing", "options"), [("onnx", []), ("onnxruntime", ["--verify", "1"])])
def test_without_the_extra_it_says_what_to_install(
    folder: Folder, trained: Trained, monkeypatch: pytest.MonkeyPatch, missing: str, options: list[str]
) -> None:
    trained()
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    finished = folder("export", "last.ckpt", *MODEL, *options)
    assert finished.status == 2
    assert "pip install 'amct-lightning[onnx]'" in finished.err
    assert written(folder) == []


def test_files_that_cannot_be_verified_are_told(folder: Folder, trained: Trained) -> None:
    trained()
    assert folder("export", "last.ckpt", *MODEL, "--form", "qdq").status == 0
    shutil.copy(folder / "last_qdq_model.onnx", folder / "copy.onnx")
    empty = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "float", [], [])
    onnx.save(onnx.helper.make_model(empty), folder / "float.onnx")
    for files, message in {
        "missing.onnx": "there is no file 'missing.onnx'",
        "run.yaml": "'run.yaml' is no ONNX file",
        "float.onnx": "is an ONNX file without the operators of a quantized network",
        "last_qdq_model.onnx copy.onnx": "are both of the form qdq",
    }.items():
        finished = folder("verify", "last.ckpt", *files.split(), *MODEL, "--random", "1")
        assert finished.status == 2
        assert message in finished.err
