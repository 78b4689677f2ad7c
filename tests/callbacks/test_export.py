"""The callback exports the best checkpoint at the end of fit, with its record, and proves what it has written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    export_onnx,
    load_qat_checkpoint,
    quantized_layers,
    verify_export,
)
from tests.callbacks.conftest import Net, TrainerFactory, loader

FORMS = ["deploy", "fake_quant", "qdq"]


class GetsWorse(Net):
    """Whose first epoch is the best one by what it logs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.trainer.current_epoch))


def fit(make_trainer: TrainerFactory, model: Net, callback: QuantRetrainCallback, *others: Any, **kwargs: Any) -> Any:
    trainer = make_trainer(callbacks=[callback, *others], enable_checkpointing=bool(others), **kwargs)
    trainer.fit(model, loader(), loader(1))
    return trainer


class TestBest:
    @pytest.fixture
    def folder(self, tmp_path: Path, make_trainer: TrainerFactory) -> Path:
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", monitor="val_loss")
        fit(make_trainer, GetsWorse(), QuantRetrainCallback(export=FORMS), checkpoints)
        return tmp_path

    def test_it_is_the_best_checkpoint_that_is_exported_with_its_record(self, folder: Path) -> None:
        written = sorted(path.name for path in (folder / "export").iterdir())
        assert written == [
            "atc.sh",
            "deploy_model.onnx",
            "export.json",
            "fake_quant_model.onnx",
            "qdq_model.onnx",
            "record.txt",
            "verification.json",
        ]
        best = folder / "checkpoints" / "epoch=0.ckpt"
        record = QuantRecord.load(folder / "export" / "record.txt")
        assert record == QuantRecord.load(best.with_name("epoch=0.record.txt"))
        assert record != QuantRecord.load(folder / "record.txt")  # that of the end
        assert str(best) in json.loads((folder / "export" / "export.json").read_text())["weights"]
        model = load_qat_checkpoint(Net(), best).eval()
        files = {form: folder / "export" / f"{form}_model.onnx" for form in FORMS}
        assert verify_export(model, files, [next(iter(loader(1)))[0]]).ok

    def test_the_command_of_atc_works_from_any_folder(self, folder: Path) -> None:
        script = (folder / "export" / "atc.sh").read_text()
        assert script.startswith('#!/bin/sh\ncd "$(dirname "$0")" || exit\n')
        assert '--model="deploy_model.onnx"' in script

    def test_the_verification_is_kept(self, folder: Path) -> None:
        report = json.loads((folder / "export" / "verification.json").read_text())
        assert [form["form"] for form in report["forms"]] == FORMS
        assert not any(form["departures"] for form in report["forms"])


def test_without_a_best_checkpoint_the_model_at_the_end_is_exported(
    tmp_path: Path, make_trainer: TrainerFactory
) -> None:
    model = Net()
    fit(make_trainer, model, QuantRetrainCallback(export="qdq", export_dir=tmp_path / "out", verify_batches=0))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "qdq_model.onnx", "record.txt"]
    export_onnx(model.eval(), tmp_path / "again.onnx", next(iter(loader()))[0])
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out" / "qdq_model.onnx").read_bytes()


def test_training_goes_on_as_without_an_export(tmp_path: Path, make_trainer: TrainerFactory) -> None:
    models = [Net(), Net()]
    for model, export in zip(models, (None, "deploy"), strict=True):
        torch.manual_seed(0)
        fit(make_trainer, model, QuantRetrainCallback(export=export, export_dir=tmp_path / "out"))
        random = torch.rand(1)
        assert model.training
    assert torch.rand(1) != random
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key


def test_a_failed_export_is_told_and_nothing_else_is_lost(tmp_path: Path, make_trainer: TrainerFactory) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.warns(
        UserWarning, match="the training is complete, its export failed.*out.*amct-lightning export CKPT"
    ):
        fit(make_trainer, Net(), QuantRetrainCallback(export="qdq", export_dir=tmp_path / "out"))
    assert len(QuantRecord.load(tmp_path / "record.txt")) == 2


def test_a_trial_run_exports_nothing(tmp_path: Path, make_trainer: TrainerFactory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(make_trainer, Net(), QuantRetrainCallback(export="qdq"), fast_dev_run=True)
    assert not (tmp_path / "export").exists()


def test_a_converted_part_is_exported_by_itself(tmp_path: Path, make_trainer: TrainerFactory) -> None:
    callback = QuantRetrainCallback(
        submodule="net", input_data=torch.ones(2, 2, 4, 4), export="deploy", verify_batches=1
    )
    fit(make_trainer, Net(), callback)
    graph = onnx.load(tmp_path / "export" / "deploy_model.onnx").graph
    assert [node.name for node in graph.node if node.op_type == "AscendQuant"] == ["0.quant", "4.quant"]
    assert [axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim] == [2, 2, 4, 4]


BY_CHANNEL = {"weights": {"algo": "ulq_retrain", "channel_wise": True}}


@pytest.mark.parametrize("form", ["deploy", "fake_quant"])
def test_weights_in_groups_are_refused_before_the_training(make_trainer: TrainerFactory, form: Any) -> None:
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(IN_GROUPS, export=["qdq", form])])
    with pytest.raises(ValueError, match=r"no weights in groups \(group_size\).*: 'net\.4'\. Export the form 'qdq'"):
        trainer.fit(model, loader())
    assert not quantized_layers(model)


@pytest.mark.parametrize("converted", [False, True])
def test_a_form_that_cannot_say_it_is_refused_before_the_training(
    make_trainer: TrainerFactory, tmp_path: Path, converted: bool
) -> None:
    model = Net()
    if converted:
        fit(make_trainer, model, QuantRetrainCallback(BY_CHANNEL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(callbacks=[QuantRetrainCallback(BY_CHANNEL, export=["qdq", "deploy"])])
    with pytest.raises(ValueError, match=r"form 'deploy' .*ATC.*: 'net\.4'\. .*channel_wise: false for Linear"):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert bool(quantized_layers(model)) == converted
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


IN_GROUPS = {"types": {"Linear": {"weights": {"algo": "ulq_retrain", "dst_type": "INT4", "group_size": 32}}}}


@pytest.mark.parametrize(
    ("config", "forms", "scales"),
    [(BY_CHANNEL, ["qdq", "fake_quant"], 3), (IN_GROUPS, ["qdq"], 6)],
    ids=["by channel", "in groups"],
)
def test_a_linear_layer_with_several_scales_is_exported_and_resumed(
    make_trainer: TrainerFactory, tmp_path: Path, config: Any, forms: Any, scales: int
) -> None:
    def run(model: Net, epochs: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        callback = QuantRetrainCallback(config, export=forms, quant_lr_scale=0.01)
        trainer = make_trainer(callbacks=[callback], max_epochs=epochs)
        trainer.fit(model, loader(), loader(1), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return dict(model.state_dict())

    whole = run(Net(), 4)
    run(Net(), 2)
    resumed = run(Net(), 4, tmp_path / "2.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert whole["net.4.weight_quantizer.scale"].shape == (scales,)
    record = QuantRecord.load(tmp_path / "4.record.txt")
    assert [len(layer.scale_w) for layer in record.values()] == [4, scales]
    assert record == QuantRecord.from_model(load_qat_checkpoint(Net(), tmp_path / "4.ckpt"))
    report = json.loads((tmp_path / "export" / "verification.json").read_text())
    assert report["ok"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"export": "onnx"}, ValueError, "export has 'onnx'; the forms are 'deploy', 'fake_quant', 'qdq'"),
        ({"export": ["qdq"], "verify_batches": -1}, ValueError, "verify_batches is -1; it must be 0 or more"),
        ({"export": ["qdq"], "verify_batches": True}, TypeError, "verify_batches is True; it must be a number"),
    ],
)
def test_wrong_arguments_are_refused_before_the_training(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QuantRetrainCallback(**arguments)
