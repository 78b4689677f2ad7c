"""restore_quant_retrain_model: a saved state goes on where it was, calibration included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRecord, RetrainConfig, convert_amct_state_dict
from amct_lightning.config import DataConfig, LayerConfig
from tests.golden_data import GOLDEN, ModelCase, model_case
from tests.test_migrate import amct_state

ERRORS = {case["id"]: case for case in json.loads((GOLDEN / "errors.json").read_text())["cases"]}


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(16 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv1(x)).relu().flatten(1))


class Script:
    """A script that trains and saves a converted model, and one that restores it."""

    def __init__(self, folder: Path, batch_num: int = 1, **data: float) -> None:
        self.config, self.record, self.pth = folder / "config.json", folder / "record.txt", folder / "model.pth"
        self.float_model, self.x = Net(), torch.randn(4, 2, 6, 6)
        config = RetrainConfig.default(self.float_model, self.x)
        config.batch_num = batch_num
        config["conv1"] = LayerConfig(retrain_data_config=DataConfig(**data))
        config.to_json(self.config)
        self.trained = amct.create_quant_retrain_model(
            str(self.config), self.float_model, str(folder / "first_record.txt"), self.x
        )
        self.optimizer = torch.optim.SGD(self.trained.parameters(), lr=0.1)

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.trained.train()(self.x), torch.tensor([0, 1, 2, 0]))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def save(self, content: object) -> None:
        torch.save(content, self.pth)

    def restore(self, model: nn.Module | None = None, **arguments: Any) -> nn.Module:
        return amct.restore_quant_retrain_model(
            str(self.config), model or self.float_model, str(self.record), self.x, str(self.pth), **arguments
        )


@pytest.fixture
def script(tmp_path: Path) -> Script:
    script = Script(tmp_path)
    script.train()
    script.save(script.trained.state_dict())
    return script


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


class TestRestored:
    def test_it_evaluates_as_before(self, script: Script) -> None:
        """AMCT calibrates again and loses the learned clips."""
        assert torch.equal(output(script.restore(), script.x), output(script.trained, script.x))

    def test_it_evaluates_as_before_with_clips_of_the_configuration(self, tmp_path: Path) -> None:
        assert ERRORS["restore_quant_retrain_model/roundtrip_eval_given_clip"]["observed"]["eval_outputs_equal"]
        script = Script(tmp_path, clip_max=2.0, clip_min=-2.0)
        script.train()
        script.save(script.trained.state_dict())
        assert torch.equal(output(script.restore(), script.x), output(script.trained, script.x))

    def test_training_on_keeps_the_learned_clips(self, script: Script) -> None:
        clip = script.trained.fc.input_quantizer.clip_max.item()
        model = script.restore().train()
        model(script.x * 100)
        assert model.fc.input_quantizer.clip_max.item() == clip

    def test_the_state_is_that_of_the_file(self, script: Script) -> None:
        state, saved = script.restore().state_dict(), script.trained.state_dict()
        assert list(state) == list(saved)
        assert all(torch.equal(state[key], saved[key]) for key in saved)

    def test_a_calibration_in_progress_starts_again(self, tmp_path: Path) -> None:
        """Observed batches are not part of a state_dict."""
        script = Script(tmp_path, batch_num=3)
        script.train(2)
        script.save(script.trained.state_dict())
        model = script.restore().train()
        for _ in range(3):
            assert model.conv1.input_quantizer.calibrating
            model(script.x)
        assert not model.conv1.input_quantizer.calibrating

    def test_the_float_model_is_not_changed(self, script: Script) -> None:
        before = {key: value.clone() for key, value in script.float_model.state_dict().items()}
        script.restore()
        assert type(script.float_model.conv1) is nn.Conv2d
        assert all(torch.equal(value, before[key]) for key, value in script.float_model.state_dict().items())

    @pytest.mark.parametrize("training", [True, False])
    def test_the_training_mode_is_that_of_the_float_model(self, script: Script, training: bool) -> None:
        model = script.restore(script.float_model.train(training))
        assert all(module.training == training for module in model.modules())

    def test_an_entry_of_the_file(self, script: Script) -> None:
        script.save({"epoch": 3, "net": script.trained.state_dict()})
        model = script.restore(state_dict_name="net")
        assert torch.equal(output(model, script.x), output(script.trained, script.x))

    def test_the_prefix_of_ddp(self, script: Script) -> None:
        assert ERRORS["restore_quant_retrain_model/module_prefix"]["outcome"] == "no_exception"
        script.save({f"module.{k}": v for k, v in script.trained.state_dict().items()})
        assert torch.equal(output(script.restore(), script.x), output(script.trained, script.x))

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_amct_s_names(self, script: Script, prefix: str) -> None:
        state = convert_amct_state_dict(script.trained.state_dict(), script.trained, to_amct=True)
        script.save({f"{prefix}{key}": value for key, value in state.items()})
        assert torch.equal(output(script.restore(), script.x), output(script.trained, script.x))

    def test_a_model_with_reused_layers_and_search_n(self, script: Script) -> None:
        model = nn.Sequential(*[nn.Linear(4, 4)] * 2)
        script.x = torch.randn(3, 4)
        RetrainConfig(layers={"0": LayerConfig()}).to_json(script.config)
        options = {"allow_reuse": True, "search_n": True}
        trained = amct.create_quant_retrain_model(str(script.config), model, str(script.record), script.x, **options)
        trained(script.x)
        script.save(trained.state_dict())
        assert torch.equal(output(script.restore(model, **options), script.x), output(trained, script.x))


@pytest.mark.parametrize(
    "name", ["cnn_bn_relu__default", "cnn_bn_relu__ulqw_cfg", "lstm__batch_num2", "res_down__default"]
)
def test_a_file_of_amct_evaluates_as_in_amct(name: str, tmp_path: Path) -> None:
    case: ModelCase = model_case(name)
    config, pth, record = tmp_path / "config.json", tmp_path / "amct.pth", tmp_path / "record.txt"
    config.write_text(case.meta["config_used"])
    torch.save(amct_state(case), pth)
    model = amct.restore_quant_retrain_model(str(config), case.float_model(), str(record), case.group("cal/"), str(pth))
    expected = case.tensors["eval_out"]
    assert (case.evaluate(model) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    assert QuantRecord.load(record).allclose(case.record, 1e-4)


class TestRecordFile:
    def test_it_is_created_empty_and_an_evaluation_pass_writes_it(self, script: Script) -> None:
        model = script.restore()
        assert script.record.read_bytes() == b""
        output(model, script.x)
        assert QuantRecord.load(script.record) == QuantRecord.from_model(script.trained)

    def test_an_existing_one_is_emptied_with_a_warning(self, script: Script, caplog: pytest.LogCaptureFixture) -> None:
        script.record.write_text("old")
        script.restore()
        assert script.record.read_bytes() == b""
        assert f"Overwriting the existing record file '{script.record}'" in caplog.text

    def test_missing_folders_are_created(self, script: Script) -> None:
        script.record = script.record.parent / "new" / "record.txt"
        script.restore()
        assert script.record.read_bytes() == b""
