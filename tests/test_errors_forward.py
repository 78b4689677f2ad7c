"""The cases of ``errors.json`` about running a converted model: what AMCT does, and what happens here."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from amct_lightning import QuantRecord, create_quant_retrain_config, create_quant_retrain_model, prepare_qat
from tests.config.test_golden import ERRORS
from tests.golden.models import MODELS

GROUP = "forward/"
CASES = {name.removeprefix(GROUP): case for name, case in ERRORS.items() if name.startswith(GROUP)}


class Script:
    """A script in AMCT's style around one golden model."""

    def __init__(self, folder: Path, name: str = "cnn_bn_relu", batch_num: int = 1) -> None:
        torch.manual_seed(0)
        self.float_model = MODELS[name]()
        self.inputs: tuple[Tensor, ...] = (torch.randn(4, 3, 8, 8),)
        if name == "lstm":
            self.inputs = (torch.randn(2, 4, 5), torch.zeros(1, 2, 6), torch.zeros(1, 2, 6))
        self.config, self.record = folder / "config.json", folder / "record.txt"
        create_quant_retrain_config(str(self.config), self.float_model, self.inputs)
        text = self.config.read_text().replace('"batch_num":1', f'"batch_num":{batch_num}')
        self.config.write_text(text)
        self.model = create_quant_retrain_model(
            str(self.config), self.float_model, str(self.record), self.inputs
        ).train()

    def train(self, steps: int = 1, lr: float = 0.05, x: Tensor | None = None) -> None:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            self.model(*((x,) if x is not None else self.inputs)).square().mean().backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.model.eval()(*self.inputs)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def nan_in_the_input_of_the_first_step(script: Script) -> None:
    """AMCT raises at once, which costs a host synchronisation in every forward; here a flag is read later."""
    script.train(x=torch.full_like(script.inputs[0], float("nan")))
    with (
        pytest.warns(UserWarning, match="NaN or infinite values reached .* conv1"),
        pytest.raises(ValueError, match="'conv1'"),
    ):
        script.evaluate()
    assert script.record.read_text() == ""


def infinity_after_a_good_step(script: Script) -> None:
    script.train()
    script.evaluate()
    good = script.record.read_text()
    bad = script.inputs[0].clone()
    bad[0, 0, 0, 0] = float("inf")
    with torch.no_grad():
        script.model.train()(bad)
    script.train(lr=1e-4)
    with pytest.warns(UserWarning, match="NaN or infinite values reached .* conv1"):
        script.evaluate()
    assert QuantRecord.load(script.record) != QuantRecord.from_text(good)


def other_dtypes(dtype: torch.dtype) -> Callable[[Script], None]:
    def check(script: Script) -> None:
        x = script.inputs[0].to(dtype)
        y = script.model.to(dtype)(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert {q.clip_max.dtype for q in [script.model.conv1.input_quantizer]} == {torch.float32}

    return check


def nonfinite_weight(value: float) -> Callable[[Script], None]:
    """Here it is found where it can be mended: at the conversion."""

    def check(script: Script) -> None:
        with torch.no_grad():
            script.float_model.conv1.weight[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="'conv1' contains NaN or infinite"):
            prepare_qat(script.float_model, None, script.inputs)

    return check


def evaluation_before_training(script: Script) -> None:
    """AMCT raises and hangs the next time; here the layers run in float and the record stays empty."""
    for _ in range(2):
        with pytest.warns(UserWarning, match="run in float"):
            y = script.evaluate()
        assert torch.equal(y, script.float_model.eval()(*script.inputs))
    assert script.record.read_text() == ""
    script.train()
    script.evaluate()
    assert list(QuantRecord.load(script.record)) == ["conv1", "conv2", "fc"]


def evaluation_during_calibration(script: Script) -> None:
    """In AMCT the evaluation counts as a calibration batch."""
    script = Script(script.config.parent, batch_num=3)
    for step in range(3):
        script.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script.evaluate()
        assert (script.record.read_text() == "") == (step < 2)


def a_second_evaluation(script: Script) -> None:
    script.train(2)
    script.evaluate()
    first = script.record.read_text()
    script.train(3, lr=0.5)
    script.evaluate()
    assert script.record.read_text() != first
    assert QuantRecord.load(script.record) == QuantRecord.from_model(script.model)


def pickling(script: Script) -> None:
    script.train()
    twin = pickle.loads(pickle.dumps(script.model))
    assert torch.equal(twin.eval()(*script.inputs), script.model.eval()(*script.inputs))


def no_counter_of_batches(script: Script) -> None:
    """AMCT counts forwards up to 100; here only calibration batches are counted, up to ``batch_num``."""
    script.train(5)
    assert script.model.conv1.input_quantizer.calibrated_batches == 1


def a_disabled_layer(script: Script) -> None:
    text = script.config.read_text().replace('"retrain_enable":true', '"retrain_enable":false', 1)
    script.config.write_text(text)
    model = create_quant_retrain_model(str(script.config), script.float_model, str(script.record), script.inputs)
    assert type(model.conv1) is nn.Conv2d


def two_dimensional_input_of_a_recurrent_layer(script: Script) -> None:
    """A sequence without a batch axis works, as in torch."""
    rnn = Script(script.config.parent, "lstm").model.rnn
    x = torch.randn(4, 5)
    y, (h, c) = rnn(x)
    assert (y.shape, h.shape, c.shape) == ((4, 6), (1, 6), (1, 6))


def a_packed_sequence(script: Script) -> None:
    rnn = Script(script.config.parent, "lstm").model.rnn
    packed = pack_padded_sequence(torch.randn(2, 4, 5), torch.tensor([4, 2]), batch_first=True)
    with pytest.raises(ValueError, match="PackedSequence"):
        rnn(packed)


def the_shape_of_the_state(script: Script) -> None:
    observed = CASES["rnn_state_shape"]["observed"]
    rnn = Script(script.config.parent, "lstm").model.rnn
    y, state = rnn(torch.randn(2, 4, 5))
    assert list(y.shape) == observed["torch_output"]
    assert [list(part.shape) for part in state] == observed["torch_state"]


CHECKS: dict[str, Callable[[Script], Any]] = {
    "act_nan": nan_in_the_input_of_the_first_step,
    "act_inf_after_init": infinity_after_a_good_step,
    "act_fp64": other_dtypes(torch.float64),
    "act_fp16": other_dtypes(torch.float16),
    "wts_nan": nonfinite_weight(float("nan")),
    "wts_inf": nonfinite_weight(float("inf")),
    "eval_before_train": evaluation_before_training,
    "eval_before_train_twice": evaluation_before_training,
    "eval_during_calibration": evaluation_during_calibration,
    "second_eval_does_not_refresh_record": a_second_evaluation,
    "pickle": pickling,
    "cur_batch": no_counter_of_batches,
    "disabled_layer": a_disabled_layer,
    "rnn_2d_input": two_dimensional_input_of_a_recurrent_layer,
    "rnn_packed": a_packed_sequence,
    "rnn_state_shape": the_shape_of_the_state,
}


@pytest.mark.parametrize("name", CHECKS)
def test_running_a_converted_model(name: str, script: Script) -> None:
    CHECKS[name](script)


def test_every_case_is_stated() -> None:
    assert set(CHECKS) == set(CASES)


def test_a_converted_model_is_in_the_mode_of_the_original(tmp_path: Path) -> None:
    """AMCT's wrappers are in training mode whatever the model was in (``create_quant_retrain_model/modes``)."""
    script = Script(tmp_path)
    model = create_quant_retrain_model(str(script.config), script.float_model.eval(), str(script.record), script.inputs)
    assert not any(module.training for module in model.modules())
