"""The functions of AMCT under their own names, used as a script without Lightning uses them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRecord


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv1(x))).flatten(1))


class Script:
    """A script written against AMCT: configure, convert, train, evaluate."""

    def __init__(self, folder: Path) -> None:
        self.config, self.record = folder / "config.json", folder / "record.txt"
        self.float_model, self.x = Net(), torch.randn(4, 2, 6, 6)
        self.label = torch.tensor([0, 1, 2, 0])
        amct.create_quant_retrain_config(str(self.config), self.float_model, self.x)

    def convert(self) -> nn.Module:
        self.model = amct.create_quant_retrain_model(str(self.config), self.float_model, str(self.record), self.x)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.model

    def train(self) -> None:
        self.model.train()
        loss = nn.functional.cross_entropy(self.model(self.x), self.label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            return self.model.eval()(self.x)

    def write_config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        raw = json.loads(self.config.read_text())
        change(raw)
        self.config.write_text(json.dumps(raw))


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.fixture
def converted(script: Script) -> Script:
    script.convert()
    return script


class TestRecordFile:
    """When the record file is written."""

    def test_it_is_empty_after_conversion(self, converted: Script) -> None:
        assert converted.record.read_bytes() == b""

    @pytest.mark.parametrize("file", ["config", "record"])
    def test_files_follow_the_umask(self, converted: Script, file: str, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        assert getattr(converted, file).stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_a_training_pass_does_not_write_it(self, converted: Script) -> None:
        converted.train()
        converted.train()
        assert converted.record.read_bytes() == b""

    def test_the_evaluation_pass_after_training_writes_it(self, converted: Script) -> None:
        converted.train()
        converted.evaluate()
        record = QuantRecord.load(converted.record)
        assert list(record) == ["conv1", "fc"]
        assert record == QuantRecord.from_model(converted.model)

    def test_an_evaluation_pass_after_more_training_refreshes_it(self, converted: Script) -> None:
        """AMCT writes it once and never again, so that its record belongs to a model of the past."""
        converted.train()
        converted.evaluate()
        first = QuantRecord.load(converted.record)
        converted.train()
        assert QuantRecord.load(converted.record) == first
        converted.evaluate()
        assert QuantRecord.load(converted.record) == QuantRecord.from_model(converted.model) != first

    def test_an_evaluation_pass_that_changes_nothing_does_not_write_it_again(self, converted: Script) -> None:
        converted.train()
        converted.evaluate()
        converted.record.write_text("touched")
        converted.evaluate()
        assert converted.record.read_text() == "touched"

    def test_a_weight_that_changed_behind_torch_s_back_in_training_is_recorded(self, converted: Script) -> None:
        """``p.data = ...``, as some optimizers do, leaves a tensor's version alone."""
        converted.train()
        converted.evaluate()
        first = converted.record.read_text()
        converted.model.train()(converted.x)
        converted.model.fc.weight.data = converted.model.fc.weight.data * 2
        converted.evaluate()
        assert converted.record.read_text() != first
        assert QuantRecord.load(converted.record) == QuantRecord.from_model(converted.model)

    def test_a_deleted_record_is_written_again(self, converted: Script) -> None:
        converted.train()
        converted.evaluate()
        converted.record.unlink()
        converted.evaluate()
        assert QuantRecord.load(converted.record) == QuantRecord.from_model(converted.model)

    def test_a_deep_copy_leaves_the_record_to_the_original(self, converted: Script) -> None:
        converted.train()
        converted.evaluate()
        before = converted.record.read_text()
        twin = copy.deepcopy(converted.model)
        with torch.no_grad():
            twin.fc.weight.mul_(3)
            twin.eval()(converted.x)
        assert converted.record.read_text() == before

    def test_the_configuration_file_is_not_taken_for_the_record(self, script: Script) -> None:
        before = script.config.read_bytes()
        with pytest.raises(ValueError, match="is the configuration file"):
            amct.create_quant_retrain_model(str(script.config), script.float_model, str(script.config), script.x)
        assert script.config.read_bytes() == before

    def test_evaluation_before_training_writes_nothing(self, converted: Script) -> None:
        with pytest.warns(UserWarning, match="run in float"):
            converted.evaluate()
        assert converted.record.read_bytes() == b""

    def test_loading_weights_before_an_evaluation_pass_refreshes_it(self, converted: Script) -> None:
        converted.train()
        converted.evaluate()
        first = QuantRecord.load(converted.record)
        converted.model.load_state_dict(Net().state_dict())
        converted.evaluate()
        assert QuantRecord.load(converted.record) == QuantRecord.from_model(converted.model) != first


def test_evaluation_before_training_runs_in_float_and_warns_once(converted: Script) -> None:
    """AMCT raises here and leaves a lock held that stops every later pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        outputs = [converted.evaluate(), converted.evaluate()]
    messages = [str(w.message) for w in caught if "run in float" in str(w.message)]
    assert len(messages) == 1
    with torch.no_grad():
        expected = converted.float_model.eval()(converted.x)
    assert all(torch.equal(output, expected) for output in outputs)


def test_training_after_an_early_evaluation_calibrates_as_usual(converted: Script) -> None:
    with pytest.warns(UserWarning, match="run in float"):
        converted.evaluate()
    converted.train()
    converted.evaluate()
    assert list(QuantRecord.load(converted.record)) == ["conv1", "fc"]


def test_the_float_model_is_not_changed(converted: Script) -> None:
    assert type(converted.float_model.conv1) is nn.Conv2d
    assert amct.quantized_layers(converted.float_model) == {}
    assert list(amct.quantized_layers(converted.model)) == ["conv1", "fc"]


def test_missing_folders_are_created_as_the_umask_says(tmp_path: Path) -> None:
    script = Script(tmp_path)
    target = tmp_path / "new" / "deep" / "config.json"
    amct.create_quant_retrain_config(str(target), script.float_model, script.x)
    (tmp_path / "plain").mkdir()
    assert target.parent.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert target.read_bytes() == script.config.read_bytes()


def test_an_existing_record_file_is_emptied(script: Script) -> None:
    script.record.write_text("old")
    script.convert()
    assert script.record.read_bytes() == b""


def test_inputs_may_be_given_by_keyword(script: Script) -> None:
    converted = amct.create_quant_retrain_model(
        config_file=str(script.config),
        model=script.float_model,
        record_file=str(script.record),
        input_data=(script.x,),
    )
    assert list(amct.quantized_layers(converted)) == ["conv1", "fc"]


class TestWrongArguments:
    """Wrong Python types are named with function, argument and expected type."""

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("config_file", 1), ("model", "resnet"), ("config_defination", 3)],
    )
    def test_config_function(self, script: Script, argument: str, value: object) -> None:
        arguments: dict[str, Any] = {
            "config_file": str(script.config),
            "model": script.float_model,
            "input_data": script.x,
        }
        with pytest.raises(TypeError, match=f"Func create_quant_retrain_config argument {argument} must be"):
            amct.create_quant_retrain_config(**arguments | {argument: value})

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("config_file", None), ("model", nn.Linear), ("record_file", Path("record.txt"))],
    )
    def test_model_function(self, script: Script, argument: str, value: object) -> None:
        arguments: dict[str, Any] = {
            "config_file": str(script.config),
            "model": script.float_model,
            "record_file": str(script.record),
            "input_data": script.x,
        }
        with pytest.raises(TypeError, match=f"Func create_quant_retrain_model argument {argument} must be"):
            amct.create_quant_retrain_model(**arguments | {argument: value})

    @pytest.mark.parametrize("value", [None, [1], "x", 3])
    def test_input_data(self, script: Script, value: object) -> None:
        with pytest.raises(RuntimeError, match=r"input data type must be tuple or torch\.Tensor!"):
            amct.create_quant_retrain_config(str(script.config), script.float_model, value)

    def test_prepare_qat_with_a_number_as_config(self, script: Script) -> None:
        with pytest.raises(TypeError, match=r"A configuration must be .*path.*found 8"):
            amct.prepare_qat(script.float_model, 8, script.x)


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any] | str, type[Exception], str]] = {
    "not_json": ("{ not json", ValueError, r"config\.json"),
    "duplicate_key": ('{"version":1,"version":1,"batch_num":1}', ValueError, r"config\.json.*version"),
    "unknown_layer": (
        lambda raw: raw.update(conv11=raw.pop("conv1")),
        ValueError,
        r"'conv11'.*config\.json.*'conv1'",
    ),
    "wrong_type": (
        lambda raw: raw["fc"].update(retrain_enable="yes"),
        TypeError,
        r"config\.json.*fc.*retrain_enable",
    ),
    "forbidden_combination": (
        lambda raw: raw["fc"]["retrain_data_config"].update(dst_type="INT4"),
        ValueError,
        r"config\.json.*fc.*INT4",
    ),
    "channel_wise_linear": (
        lambda raw: raw["fc"]["retrain_weight_config"].update(channel_wise=True),
        ValueError,
        r"config\.json.*fc.*channel_wise",
    ),
    "nothing_enabled": (
        lambda raw: [raw[name].update(retrain_enable=False) for name in ("conv1", "fc")],
        ValueError,
        r"config\.json.*No layer retrain enabled",
    ),
}


class TestBadInput:
    """Each mistake is named with its remedy, and existing files keep their content."""

    @pytest.fixture
    def files(self, script: Script) -> Script:
        script.record.write_text("precious")
        return script

    @pytest.mark.parametrize("mistake", BAD_CONFIGS)
    def test_a_bad_config_names_the_culprit_and_leaves_the_record(self, files: Script, mistake: str) -> None:
        change, error, message = BAD_CONFIGS[mistake]
        if isinstance(change, str):
            files.config.write_text(change)
        else:
            files.write_config(change)
        content = files.config.read_bytes()
        with pytest.raises(error, match=f"(?s){message}"):
            files.convert()
        assert files.record.read_text() == "precious"
        assert files.config.read_bytes() == content

    def test_a_missing_config(self, files: Script) -> None:
        files.config.unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            files.convert()
        assert files.record.read_text() == "precious"
        assert not files.config.exists()

    def test_a_model_that_is_quantized_already(self, files: Script) -> None:
        content = files.config.read_bytes()
        quantized = amct.prepare_qat(files.float_model, None, files.x)
        with pytest.raises(RuntimeError, match=r"quantized already \(conv1, fc\)"):
            amct.create_quant_retrain_config(str(files.config), quantized, files.x)
        with pytest.raises(RuntimeError, match=r"quantized already \(conv1, fc\)"):
            amct.create_quant_retrain_model(str(files.config), quantized, str(files.record), files.x)
        assert files.record.read_text() == "precious"
        assert files.config.read_bytes() == content

    def test_a_model_without_layers_to_quantize(self, files: Script) -> None:
        content = files.config.read_bytes()
        with pytest.raises(ValueError, match="No supported layers"):
            amct.create_quant_retrain_config(str(files.config), nn.Sequential(nn.ReLU()), files.x)
        assert files.config.read_bytes() == content

    def test_input_that_the_model_rejects(self, files: Script) -> None:
        content = files.config.read_bytes()
        with pytest.raises(RuntimeError, match=r"Net failed on the given input_data .*\(1, 7, 6, 6\)") as caught:
            amct.create_quant_retrain_config(str(files.config), files.float_model, torch.randn(1, 7, 6, 6))
        assert "expected input" in str(caught.value.__cause__)
        files.x = torch.randn(1, 7, 6, 6)
        with pytest.raises(RuntimeError, match="Net failed on the given input_data"):
            files.convert()
        assert files.record.read_text() == "precious"
        assert files.config.read_bytes() == content

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nonfinite_weights(self, files: Script, value: float) -> None:
        with torch.no_grad():
            files.float_model.fc.weight[0, 0] = value
        with pytest.raises(ValueError, match=r"weight of layer 'fc' contains NaN or infinite"):
            files.convert()
        assert files.record.read_text() == "precious"

    @pytest.mark.parametrize("kind", ["record", "config"])
    def test_a_path_that_cannot_be_written_is_refused_before_any_work(self, files: Script, kind: str) -> None:
        occupied = files.config.parent / "occupied"
        occupied.write_text("a file, not a folder")
        target = str(occupied / "out.txt")
        with pytest.raises(OSError, match=rf"{kind} file .*out\.txt' cannot be written.*Choose a path"):
            if kind == "record":
                amct.create_quant_retrain_model(str(files.config), files.float_model, target, files.x)
            else:
                amct.create_quant_retrain_config(target, files.float_model, files.x)
        assert occupied.read_text() == "a file, not a folder"

    def test_a_record_path_that_is_a_folder(self, files: Script) -> None:
        with pytest.raises(IsADirectoryError, match=r"record file .* is a folder"):
            amct.create_quant_retrain_model(str(files.config), files.float_model, str(files.config.parent), files.x)

    def test_a_record_of_a_model_that_is_not_calibrated(self, converted: Script) -> None:
        with pytest.raises(ValueError, match=r"not calibrated yet: 'conv1', 'fc'.*calibrate\(model, batches\)"):
            QuantRecord.from_model(converted.model)

    def test_a_record_of_a_float_model(self, script: Script) -> None:
        with pytest.raises(ValueError, match=r"Net has no quantized layers.*prepare_qat"):
            QuantRecord.from_model(script.float_model)

    def test_a_record_of_a_model_that_diverged(self, converted: Script) -> None:
        converted.train()
        with torch.no_grad():
            converted.model.fc.input_quantizer.clip_max.fill_(float("inf"))
        with pytest.raises(ValueError, match=r"'fc' has NaN or infinite factors \(scale_d.*learning rate"):
            QuantRecord.from_model(converted.model)
