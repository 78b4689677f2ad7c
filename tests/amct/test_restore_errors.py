"""restore_quant_retrain_model with files and arguments that do not fit: clear errors, and no harm done."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amct_lightning as amct
from amct_lightning import RetrainConfig
from tests.amct.test_restore import ERRORS, Net, Script


@pytest.fixture
def script(tmp_path: Path) -> Script:
    script = Script(tmp_path)
    script.train()
    script.save(script.trained.state_dict())
    return script


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name("executed")

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


BAD_FILES: dict[str, tuple[Callable[[Script, dict[str, Tensor]], object], type[Exception], str]] = {
    "pth_missing": (lambda s, _: s.pth.unlink(), FileNotFoundError, r"model\.pth"),
    "folder": (lambda s, _: (s.pth.unlink(), s.pth.mkdir()), IsADirectoryError, r"model\.pth"),
    "state_dict_name_needed": (
        lambda s, state: s.save({"sd": state}),
        RuntimeError,
        r"Missing: 'conv1\.weight'.*If one of 'sd' is the state_dict, give its name as state_dict_name",
    ),
    "float_state_dict": (
        lambda s, _: s.save(s.float_model.state_dict()),
        RuntimeError,
        r"Missing: 'conv1\.input_quantizer\.clip_max'.*and \d+ more; unexpected: nothing.*state of the float model",
    ),
    "name_missing": (
        lambda s, state: (state.pop("fc.bias"), s.save(state)),
        RuntimeError,
        r"Missing: 'fc\.bias'; unexpected: nothing",
    ),
    "name_unexpected": (
        lambda s, state: s.save(state | {"head.bias": torch.ones(1)}),
        RuntimeError,
        r"Missing: nothing; unexpected: 'head\.bias'",
    ),
    "quantizer_missing": (
        lambda s, state: s.save({k: v for k, v in state.items() if "fc.input_quantizer" not in k}),
        RuntimeError,
        r"Missing: 'fc\.input_quantizer\.clip_max'",
    ),
    "other_shape": (
        lambda s, state: s.save(state | {"fc.weight": torch.ones(3, 5)}),
        RuntimeError,
        r"size mismatch for fc\.weight.*config file",
    ),
    "amct_name_missing": (
        lambda s, _: s.save({"fc.quant_module.acts_clip_max": torch.ones(())}),
        RuntimeError,
        r"as AMCT converts it.*missing \(\d+\): 'conv1\.scale_w'",
    ),
    "lightning_checkpoint": (
        lambda s, state: s.save({"state_dict": state, "pytorch-lightning_version": "2.6.6"}),
        RuntimeError,
        r"model\.pth' is a Lightning checkpoint.*load_qat_checkpoint",
    ),
    "tensor": (lambda s, _: s.save(torch.ones(1)), RuntimeError, "of type Tensor instead of a state_dict"),
    "text": (lambda s, _: s.pth.write_text("not a checkpoint"), RuntimeError, "cannot be read as a checkpoint"),
    "empty": (lambda s, _: s.pth.write_bytes(b""), RuntimeError, "cannot be read as a checkpoint"),
    "truncated": (
        lambda s, _: s.pth.write_bytes(s.pth.read_bytes()[:-200]),
        RuntimeError,
        r"cannot be read as a checkpoint.*damaged",
    ),
    "whole_model": (lambda s, _: s.save(s.float_model), RuntimeError, "run code from the file"),
    "objects": (lambda s, _: s.save({"x": _Touch(s.pth)}), RuntimeError, "run code from the file"),
    "pickle": (
        lambda s, _: s.pth.write_bytes(pickle.dumps(_Touch(s.pth), protocol=2)),
        RuntimeError,
        "run code from the file",
    ),
}


class TestBadFiles:
    """The error names the file and says what to do; an existing record stays; nothing from the file is executed."""

    @pytest.mark.parametrize("mistake", BAD_FILES)
    def test_a_file_that_does_not_fit(self, script: Script, mistake: str) -> None:
        write, error, message = BAD_FILES[mistake]
        write(script, dict(script.trained.state_dict()))
        script.record.write_text("precious")
        with pytest.raises(error, match=f"(?s){message}") as caught:
            script.restore()
        assert "model.pth" in str(caught.value)
        assert script.record.read_text() == "precious"
        assert not script.pth.with_name("executed").exists()

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("foo", KeyError, r"model\.pth' has no key name: foo\. It has 'epoch', 'old', 'net'"),
            ("", KeyError, "has no key name"),
            ("old", KeyError, r"entry 'old' of .*model\.pth' is empty\. The file has 'epoch', 'old', 'net'"),
            ("epoch", RuntimeError, r"entry 'epoch' of .*model\.pth' is of type int and no state_dict"),
        ],
    )
    def test_an_entry_that_is_no_state_dict(
        self, script: Script, name: str, error: type[Exception], message: str
    ) -> None:
        script.save({"epoch": 3, "old": {}, "net": script.trained.state_dict()})
        script.record.write_text("precious")
        with pytest.raises(error, match=message):
            script.restore(state_dict_name=name)
        assert script.record.read_text() == "precious"

    @pytest.mark.parametrize("case", ["pth_missing", "state_dict_name_needed", "float_state_dict"])
    def test_the_exception_is_of_amct_s_type(self, case: str) -> None:
        recorded = ERRORS[f"restore_quant_retrain_model/{case}"]
        assert BAD_FILES[case][1].__name__ == recorded["exception_type"]

    def test_a_state_of_another_configuration(self, script: Script) -> None:
        config = RetrainConfig.default(script.float_model, script.x)
        del config["fc"]
        config.to_json(script.config)
        with pytest.raises(RuntimeError, match=r"(?s)unexpected: 'fc\.input_quantizer.*Use the config file"):
            script.restore()

    def test_a_state_of_another_model(self, script: Script) -> None:
        with pytest.raises(RuntimeError, match=r"(?s)model\.pth.*size mismatch for conv1\.weight"):
            script.restore(Net(width=8))

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("config_file", 1),
            ("model", Net),
            ("record_file", None),
            ("pth_file", Path("x.pth")),
            ("state_dict_name", 1),
        ],
    )
    def test_a_wrong_type(self, script: Script, argument: str, value: object) -> None:
        arguments: dict[str, Any] = {
            "config_file": str(script.config),
            "model": script.float_model,
            "record_file": str(script.record),
            "input_data": script.x,
            "pth_file": str(script.pth),
        }
        with pytest.raises(TypeError, match=f"Func restore_quant_retrain_model argument {argument} must be"):
            amct.restore_quant_retrain_model(**arguments | {argument: value})

    def test_input_data_of_a_wrong_type(self, script: Script) -> None:
        script.x = [1]
        with pytest.raises(RuntimeError, match=r"input data type must be tuple or torch\.Tensor!"):
            script.restore()

    def test_a_model_that_is_quantized_already(self, script: Script) -> None:
        with pytest.raises(RuntimeError, match="quantized already"):
            script.restore(script.trained)


def test_the_checkpoint_is_not_taken_for_the_record(script: Script) -> None:
    before = script.pth.read_bytes()
    with pytest.raises(ValueError, match="is the checkpoint"):
        amct.restore_quant_retrain_model(
            str(script.config), script.float_model, str(script.pth), script.x, str(script.pth)
        )
    assert script.pth.read_bytes() == before
