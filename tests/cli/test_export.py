"""``amct-lightning export`` and ``verify``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from amct_lightning import QuantRecord, load_qat_checkpoint
from amct_lightning.cli import main
from amct_lightning.commands.base import UserError
from amct_lightning.commands.export.batches import fitted, read_batches
from amct_lightning.files import is_file
from tests.cli.conftest import MODULE, RUN, Finished, Folder

MORE = """
from collections import OrderedDict

class Tokens(pl.LightningModule):
    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net, self.embed = net, nn.Embedding(10, size)

    def forward(self, ids, mask, scale=None):
        return {"scores": self.net(self.embed(ids)) * mask.unsqueeze(-1)}

    def training_step(self, batch, batch_idx):
        return self(*batch)["scores"].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Sentences(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(80).view(16, 5) % 10, torch.ones(16, 5)), batch_size=8)
"""
TOKENS: dict[str, Any] = {
    "model": {"class_path": "demo_module.Tokens", "init_args": {"net": {"class_path": "torch.nn.Linear"}, "size": 8}},
    "data": "demo_module.Sentences",
}
TOKENS["model"]["init_args"]["net"]["init_args"] = {"in_features": 8, "out_features": 3}
SHAPES = ("--input-shape", "ids=1,5:int64", "--input-shape", "mask=1,5")
MODEL = ("--model", "run.yaml")
Trained = Callable[..., None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train once for each set of options, with the command itself; the checkpoint is in the folder."""
    made: dict[str, Path] = {}

    def run(content: dict[str, Any], *options: str) -> Path:
        key = repr((content, options))
        if key not in made:
            made[key] = path = tmp_path_factory.mktemp("run")
            before = Path.cwd()
            os.chdir(path)
            try:
                (path / "demo_module.py").write_text(MODULE + MORE)
                (path / "run.yaml").write_text(json.dumps(content))
                assert main(["fit", "--config", "run.yaml", *options]) == 0
                next(path.glob("checkpoints/*.ckpt")).rename(path / "last.ckpt")
            finally:
                os.chdir(before)
                sys.modules.pop("demo_module", None)
        return made[key]

    return run


@pytest.fixture
def trained(folder: Folder, runs: Callable[..., Path]) -> Trained:
    """Put ``run.yaml`` and the checkpoint of its run, ``last.ckpt``, into the folder that the user works in."""

    def give(*options: str, **sections: Any) -> None:
        trainer = {**RUN["trainer"], "enable_checkpointing": True}  # type: ignore[dict-item]
        path = runs({**RUN, "trainer": trainer, **sections}, *options)
        for name in ("demo_module.py", "run.yaml", "last.ckpt"):
            shutil.copy(path / name, folder / name)

    return give


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def written(folder: Folder, pattern: str = "last_*") -> list[str]:
    return sorted(path.name for path in folder.path.rglob(pattern))


def run_onnx(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    output: np.ndarray = session.run(None, given)[0]
    return output


def one_line(finished: Finished) -> str:
    return " ".join(finished.err.split())


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


def test_batches_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    model = torch.nn.Bilinear(3, 3, 1)  # forward(input1, input2)
    torch.save((x, y), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", x.double().numpy(), y.double().numpy())
    np.savez(tmp_path / "c.npz", input1=x.numpy(), input2=y.numpy())
    save_file({"input1": x, "input2": y}, tmp_path / "d.safetensors")
    for name in ("a.pt", "b.npz", "c.npz", "d.safetensors"):
        (batch,) = read_batches(str(tmp_path / name), model)
        values = tuple(batch.values()) if isinstance(batch, dict) else batch
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(values, (x, y), strict=True))
    save_file({"whatever": x}, tmp_path / "e.safetensors")
    np.save(tmp_path / "f.npy", x.numpy())
    linear = torch.nn.Linear(3, 1)
    assert torch.equal(read_batches(str(tmp_path / "e.safetensors"), linear)[0][0], x)  # type: ignore[index]
    assert torch.equal(read_batches(str(tmp_path / "f.npy"), linear)[0], x)  # type: ignore[arg-type]


def test_batches_are_cut_only_along_an_axis_of_samples() -> None:
    notes: list[str] = []
    whole = list(fitted([torch.zeros(5, 3)], {"x": (2, 3)}, notes.append))
    assert [len(batch) for batch in whole] == [2, 2]
    assert len(notes) == 1
    state = (torch.zeros(4, 2, 3), torch.zeros(1, 2, 8))  # a sequence and a hidden state
    assert list(fitted([state], {"x": (4, 2, 3), "h": (1, 2, 8)}, notes.append)) == [state]
    with pytest.raises(UserError, match="a batch holds 1 sample"):
        list(fitted([torch.zeros(1, 3)], {"x": (2, 3)}, notes.append))
