"""Which rule says that the lower end of a range stays 0, who keeps that, and what happens where it is wrong."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    RetrainConfig,
    calibrate,
    conversion_report,
    create_quant_retrain_config,
    create_quant_retrain_model,
    load_qat_checkpoint,
    prepare_qat,
    save_quant_retrain_model,
)
from amct_lightning.config import QuantChoices, load_config
from amct_lightning.config.fit import SimpleFile
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules import quantized_layers
from tests.callbacks.conftest import Net as Lit
from tests.callbacks.conftest import loader

X = torch.linspace(-4, 4, 64).view(2, 2, 4, 4)
AFTER_RELU = {"activations": {"fixed_min": "after_relu"}}
GAIN = "input never negative, yet integers for values below 0: set fixed_min to true: '4'"


class Net(Lit):
    """The network of the callbacks' tests, whose linear layer reads what a ReLU6 and a flattening made."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.ReLU6()


def network() -> nn.Sequential:
    return Net().net


def fixed(model: nn.Module) -> list[bool]:
    return [layer.input_quantizer.fixed_min for layer in quantized_layers(model).values()]  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [None, {}, "A4W4", QuantChoices(), {"activations": {"fixed_min": "propagate"}}])
def test_choices_propagate(config: Any) -> None:
    model = prepare_qat(network(), config, X)
    assert fixed(model) == [False, True]
    assert [row.fixed_min for row in conversion_report(model).rows] == [False, True]


def test_a_yaml_file_propagates(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("batch_num: 1")
    assert fixed(prepare_qat(network(), tmp_path / "my.yaml", X)) == [False, True]


def test_amct_s_files_keep_its_rule_and_the_report_names_who_would_gain(tmp_path: Path) -> None:
    create_quant_retrain_config(str(tmp_path / "amct.json"), network(), X)
    (tmp_path / "my.cfg").write_text("batch_num: 1")
    for config in (RetrainConfig.default(network(), X), tmp_path / "amct.json", tmp_path / "my.cfg", AFTER_RELU):
        model = prepare_qat(network(), config, X)
        assert fixed(model) == [False, False]
        assert [note for note in conversion_report(model).warnings if "negative" in note] == [GAIN]
    model = create_quant_retrain_model(str(tmp_path / "amct.json"), network(), str(tmp_path / "record.txt"), X)
    assert fixed(model) == [False, False]
    assert load_config(SimpleFile(tmp_path / "my.cfg")).propagates is False


@pytest.mark.parametrize("given", [True, False])
def test_what_is_given_counts(given: bool) -> None:
    model = prepare_qat(network(), {"layers": {"4": {"activations": {"fixed_min": given}}}}, X)
    assert fixed(model) == [False, given]
    assert not [note for note in conversion_report(model).warnings if "negative" in note]


def test_a_layer_that_only_propagation_finds_computes_with_all_integers() -> None:
    model = prepare_qat(network(), "A4W4", X)
    calibrate(model, [X])
    quantizer = model[4].input_quantizer
    assert (quantizer.clip_min.item(), quantizer.offset.item()) == (0, -8)


@pytest.mark.parametrize("config", [QuantChoices(), load_config("A8W4"), load_config(AFTER_RELU), None])
def test_a_plan_survives_its_plain_form(config: Any) -> None:
    plan = make_plan(network(), config, X)
    again = QuantPlan.from_dict(plan.to_dict())
    assert again == plan
    assert [layer.never_negative for layer in again.layers] == [False, True]


def fit(folder: Path, epochs: int, config: Any, checkpoint: Path | None = None) -> Net:
    model = Net()
    callback = QuantRetrainCallback(config=config, record_file=folder / "record.txt")
    trainer = pl.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(), ckpt_path=checkpoint, weights_only=checkpoint is not None or None)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return model


def as_before_the_rule(checkpoint: Path) -> Path:
    """Write a checkpoint as versions wrote it that knew AMCT's rule only."""
    content = torch.load(checkpoint, weights_only=False)
    (plan,) = (found for found in _plans(content) if "layers" in found)
    plan.pop("propagating")
    for layer in plan["layers"]:
        del layer["never_negative"]
    torch.save(content, checkpoint.with_name("old.ckpt"))
    return checkpoint.with_name("old.ckpt")


def _plans(tree: Any) -> Any:
    if isinstance(tree, dict):
        if "deploy_grid" in tree and "refused" in tree:
            yield tree
        for value in tree.values():
            yield from _plans(value)


@pytest.mark.parametrize("config", [None, {"batch_num": 1}, {"activations": {"fixed_min": "propagate"}}])
def test_an_older_checkpoint_keeps_what_it_was_trained_with(tmp_path: Path, config: Any) -> None:
    fit(tmp_path, 1, AFTER_RELU)
    old = as_before_the_rule(tmp_path / "1.ckpt")
    assert fixed(fit(tmp_path, 2, config, old)) == [False, False]
    assert fixed(load_qat_checkpoint(Net(), old)) == [False, False]


@pytest.mark.parametrize("config", [None, {"batch_num": 1}, AFTER_RELU])
def test_a_training_goes_on_with_what_propagation_found(tmp_path: Path, config: Any) -> None:
    fit(tmp_path, 1, None)
    assert fixed(fit(tmp_path, 2, config, tmp_path / "1.ckpt")) == [False, True]


def test_a_given_one_that_differs_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 1, None)
    config = {"layers": {"net.4": {"activations": {"fixed_min": False}}}}
    with pytest.raises((RuntimeError, ValueError), match=r"fixed_min is .* there and False here"):
        fit(tmp_path, 2, config, tmp_path / "1.ckpt")
    config = {"layers": {"net.4": {"activations": {"fixed_min": True}}}}  # which is what the rule found
    assert fixed(fit(tmp_path, 2, config, tmp_path / "1.ckpt")) == [False, True]


def test_a_schedule_that_calibrates_longer_keeps_the_rule(tmp_path: Path) -> None:
    model = Net()
    callback = QuantRetrainCallback(schedule={"calibrate_batches": 2}, record_file=tmp_path / "record.txt")
    trainer = pl.Trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[callback], accelerator="cpu", logger=False)
    trainer.fit(model, loader())
    found = find_plan(model)
    assert found is not None
    assert found[1].config.batch_num == 2
    assert fixed(model) == [False, True]


def test_amct_s_function_saves_what_was_converted_by_choices(tmp_path: Path) -> None:
    config, record = str(tmp_path / "amct.json"), tmp_path / "record.txt"
    create_quant_retrain_config(config, network(), X)
    model = prepare_qat(network(), None, X)
    calibrate(model, [X])
    QuantRecord.from_model(model).save(record)
    save_quant_retrain_model(config, model.eval(), str(record), str(tmp_path / "m"), X)
    assert (tmp_path / "m_deploy_model.onnx").exists()


def warned(model: nn.Module, batch: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, [batch])
    return [str(item.message) for item in caught if "below becomes 0" in str(item.message)]


def test_negative_values_of_a_range_from_0_on_are_told_of() -> None:
    wrong = {"layers": {"0": {"activations": {"fixed_min": True}}}}
    (message,) = warned(prepare_qat(network(), wrong, X), X)
    assert message.startswith("The inputs of '0' were negative in calibration")
    assert "Set fixed_min to false" in message
    assert warned(prepare_qat(network(), wrong, X), X.abs()) == []
    assert warned(prepare_qat(network(), None, X), X) == []


def test_a_data_flow_that_changes_after_the_conversion_is_told_of() -> None:
    model = prepare_qat(network(), None, X)
    model[2] = nn.Identity()
    (message,) = warned(model, X)
    assert message.startswith("The inputs of '4' were negative in calibration")


def test_the_callback_tells_it_as_well(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"The inputs of 'net\.0' were negative in calibration"):
        fit(tmp_path, 1, {"layers": {"net.0": {"activations": {"fixed_min": True}}}})


def test_a_copy_of_a_calibrated_model_tells_it_too() -> None:
    model = prepare_qat(network(), {"layers": {"0": {"activations": {"fixed_min": True}}}}, X)
    model.train()(X)
    assert warned(copy.deepcopy(model).to("cpu"), X)
