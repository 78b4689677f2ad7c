"""``amct-lightning export`` and ``verify``: what is written, and that it is the model."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from amct_lightning import QuantRecord, load_qat_checkpoint
from amct_lightning.files import is_file
from tests.cli.conftest import Folder
from tests.cli.export.conftest import MODEL, SHAPES, TOKENS, Trained, images, run_onnx, written


def test_a_checkpoint_becomes_two_networks_with_its_record_and_the_command_of_atc(
    folder: Folder, trained: Trained
) -> None:
    trained("--model.width=6")  # which the checkpoint tells, run.yaml does not
    status, out, err = folder("export", "last.ckpt", *MODEL)
    assert (status, err) == (0, "")
    assert written(folder) == ["last_atc.sh", "last_deploy_model.onnx", "last_fake_quant_model.onnx", "last_record.txt"]
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("deploy", "last_deploy_model.onnx", "11"),
        ("fake_quant", "last_fake_quant_model.onnx", "11"),
    ]
    assert "Input: x 1x1x8x8. Output: output 1x3." in out
    assert '--input_shape="x:1,1,8,8"' in out
    assert folder("record", "diff", "last_record.txt", "last.ckpt").status == 0
    model = load_qat_checkpoint(sys.modules["demo_module"].Classifier, folder / "last.ckpt").eval()
    with torch.no_grad():
        expected = model(images(1)).numpy()
    found = run_onnx(folder / "last_fake_quant_model.onnx", images(1))
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())  # the bias is rounded there


def test_the_script_of_atc_works_from_any_folder(folder: Folder, trained: Trained) -> None:
    trained()
    options = ("--form", "deploy", "--target", "A2", "--soc-version", "Ascend910B3", "--output", "out/")
    out = folder("export", "last.ckpt", *MODEL, *options).out
    assert '--model="out/last_deploy_model.onnx"' in out
    script = (folder / "out/last_atc.sh").read_text()
    assert script.startswith('#!/bin/sh\ncd "$(dirname "$0")" || exit\natc --model="last_deploy_model.onnx" ')
    assert '--soc_version="Ascend910B3"' in script


def test_an_export_may_go_to_a_remote_place(folder: Folder, trained: Trained) -> None:
    trained()
    status, out, _ = folder("export", "last.ckpt", *MODEL, "--output", "memory://test_export/net")
    assert status == 0
    assert '--model="net_deploy_model.onnx"' in out
    kinds = ("deploy_model.onnx", "fake_quant_model.onnx", "record.txt", "atc.sh")
    assert all(is_file(f"memory://test_export/net_{kind}") for kind in kinds)
    assert written(folder) == []


def test_all_forms_are_made_from_one_graph(folder: Folder, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    original, calls = torch.onnx.export, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("opset_version"))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", counted)
    assert folder("export", "last.ckpt", *MODEL, "--form", "deploy", "fake_quant", "qdq").status == 0
    assert calls == [11]


def test_two_runs_in_a_folder_replace_the_same_files_and_leave_those_of_other_checkpoints(
    folder: Folder, trained: Trained
) -> None:
    trained()
    shutil.copy(folder / "last.ckpt", folder / "epoch=1-step=4.ckpt")
    for name in ("last.ckpt", "last.ckpt", "epoch=1-step=4.ckpt"):
        assert folder("export", name, *MODEL, "--form", "qdq", "-o", "out/").status == 0
    names = sorted(path.name for path in (folder / "out").iterdir())
    kinds = ("qdq_model.onnx", "record.txt")
    assert names == [f"{stem}_{kind}" for stem in ("epoch_1-step_4", "last") for kind in kinds]


def test_export_verifies_on_real_inputs(folder: Folder, trained: Trained) -> None:
    trained()
    torch.save(images(5), folder / "images.pt")
    options = (*MODEL, "--form", "deploy", "fake_quant", "qdq", "--batches", "images.pt", "--input-shape", "2,1,8,8")
    status, out, err = folder("export", "last.ckpt", *options)
    assert (status, err) == (0, "")
    assert "4 sample(s) in 2 batch(es)" in out
    assert "The exported files compute what the model does." in out
    assert "Note: 1 sample(s) are left out: the exported network takes exactly 2 at a time." in out
    assert "random" not in out
    assert "2 sample(s) in 1 batch(es)" in folder("export", "last.ckpt", *options, "--verify", "1").out


def test_random_batches_have_to_be_asked_for_and_are_told(folder: Folder, trained: Trained) -> None:
    trained()
    status, out, _ = folder("export", "last.ckpt", *MODEL, "--form", "qdq", "--verify", "2")
    assert status == 0
    assert "Note: The batches were random numbers, which show little" in out
    files = ("verify", "last.ckpt", "last_qdq_model.onnx", *MODEL)
    status, _, err = folder(*files)
    assert status == 2
    assert "give real inputs of the model with --batches FILE, or ask for random numbers with --random N" in err
    status, out, _ = folder(*files, "--random", "1")
    assert status == 0
    assert "random numbers, which show little" in out


def test_a_fault_in_a_file_is_found_with_status_1_and_its_layer(folder: Folder, trained: Trained) -> None:
    trained()
    torch.save([images(1), images(1)], folder / "images.pt")
    assert folder("export", "last.ckpt", *MODEL, "-o", "net").status == 0
    files = ("verify", "last.ckpt", "net_deploy_model.onnx", "net_fake_quant_model.onnx", *MODEL)
    assert folder(*files, "--batches", "images.pt").status == 0
    network = onnx.load(folder / "net_deploy_model.onnx")
    name = next(node.input[1] for node in network.graph.node if node.name == "net.4")
    weight = next(one for one in network.graph.initializer if one.name == name)
    codes = numpy_helper.to_array(weight).copy()
    codes.flat[0] += 1 if codes.flat[0] < 100 else -1
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    onnx.save(network, folder / "net_deploy_model.onnx")
    status, out, _ = folder(*files, "--batches", "images.pt", "--json", "report.json")
    assert status == 1
    assert "First departure: deploy: layer 'net.4': weight: 1 of 432 differ" in " ".join(out.split())
    report = json.loads((folder / "report.json").read_text())
    assert (report["ok"], report["first_departure"]["layer"]) == (False, "net.4")


def test_several_inputs_by_name_an_argument_from_the_yaml_and_any_batch_size(folder: Folder, trained: Trained) -> None:
    trained(**TOKENS)
    np.savez(folder / "batches.npz", mask=np.linspace(0, 1, 350).reshape(70, 5), ids=np.arange(350).reshape(70, 5) % 10)
    options = ("--dynamic-batch", "--form", "deploy", "fake_quant", "qdq", "--batches", "batches.npz")
    status, out, err = folder("export", "last.ckpt", *MODEL, *SHAPES, *options)
    assert (status, err) == (0, "")
    assert "Input: ids batchx5, mask batchx5." in out
    assert "70 sample(s) in 3 batch(es)" in out
    assert "ATC does not convert quantized models with dynamic shapes" in out
    assert run_onnx(folder / "last_qdq_model.onnx", torch.zeros(7, 5).long(), torch.ones(7, 5)).shape == (7, 5, 3)
    status, _, err = folder("export", "last.ckpt", "--model", "demo_module.Tokens", *SHAPES)
    assert status == 2
    assert "arguments are required: net" in err


def test_a_part_of_what_was_quantized_is_exported_and_verified_alone(folder: Folder, trained: Trained) -> None:
    trained()
    part = (*MODEL, "--submodule", "net")
    status, out, _ = folder("export", "last.ckpt", *part, "--input-shape", "4,1,8,8", "--form", "qdq", "-o", "part")
    assert status == 0
    assert "Input: input 4x1x8x8." in out
    assert list(QuantRecord.load(folder / "part_record.txt")) == ["0", "4"]
    torch.save(images(4), folder / "images.pt")
    assert folder("verify", "last.ckpt", "part_qdq_model.onnx", *part, "--batches", "images.pt").status == 0
