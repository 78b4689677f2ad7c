"""Situations in which a run could go wrong without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    RetrainConfig,
    load_qat_checkpoint,
    prepare_qat,
    quantized_layers,
)
from amct_lightning.callbacks.checks import describe_difference, warn_spawned
from amct_lightning.config import DataConfig, LayerConfig
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import Net, TrainerFactory, loader

INT16 = RetrainConfig(layers={"net.0": LayerConfig(retrain_data_config=DataConfig(dst_type="INT16"))})


class TestModelInEvalMode:
    """Pretrained models often come in eval mode, and Lightning leaves them there."""

    def test_it_is_calibrated_and_trained_all_the_same(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        model = Net().eval()
        make_trainer(callbacks=[QuantRetrainCallback(record_file=tmp_path / "r.txt")]).fit(model, loader())
        assert not any(q.calibrating for q in activation_quantizers(model).values())
        assert list(QuantRecord.load(tmp_path / "r.txt")) == ["net.0", "net.4"]
        assert not model.net[1].training

    def test_also_if_a_hook_puts_it_back_there_in_every_epoch(self, make_trainer: TrainerFactory) -> None:
        class Frozen(Net):
            def on_train_epoch_start(self) -> None:
                self.net.eval()

        model = Frozen()
        make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=1).fit(model, loader())
        assert not any(q.calibrating for q in activation_quantizers(model).values())


class TestModelThatIsQuantizedAlready:
    def test_another_configuration_is_refused(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
        trainer = make_trainer(callbacks=[QuantRetrainCallback(config=INT16)])
        with pytest.raises(ValueError, match=r"Net is quantized already, and config .*'net\.0'.*Leave `config` out"):
            trainer.fit(model, loader())

    @pytest.mark.parametrize("config", [None, {"batch_num": 1}, {"weights": {"dst_type": "INT8"}}])
    def test_the_same_configuration_or_none_goes_on(self, make_trainer: TrainerFactory, config: Any) -> None:
        model = Net()
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
        first = model.net[0].input_quantizer
        make_trainer(callbacks=[QuantRetrainCallback(config=config)]).fit(model, loader())
        assert model.net[0].input_quantizer is first

    def test_the_rules_of_a_configuration_apply_to_quantized_layers_as_to_float_ones(
        self, make_trainer: TrainerFactory
    ) -> None:
        choices = {"skip_types": ["Linear"], "layers": {"net.0": {"activations": {"dst_type": "INT16"}}}}
        model = Net()
        make_trainer(callbacks=[QuantRetrainCallback(config=choices)]).fit(model, loader())
        make_trainer(callbacks=[QuantRetrainCallback(config=choices)]).fit(model, loader())
        assert list(quantized_layers(model)) == ["net.0"]

    @pytest.mark.filterwarnings("ignore:.*stays in float")
    def test_a_configuration_that_lists_a_layer_with_weight_norm_is_the_same_again(
        self, make_trainer: TrainerFactory
    ) -> None:
        model = Net()
        model.net[4] = nn.utils.parametrizations.weight_norm(model.net[4])
        config = RetrainConfig(layers={"net.0": LayerConfig(), "net.4": LayerConfig()})
        for _ in range(2):
            make_trainer(callbacks=[QuantRetrainCallback(config=config)]).fit(model, loader())
        assert list(quantized_layers(model)) == ["net.0"]

    def test_a_part_that_was_converted_by_hand_goes_on(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        prepare_qat(model.net, None, torch.randn(2, 2, 4, 4), inplace=True)
        make_trainer(callbacks=[QuantRetrainCallback(submodule="net")]).fit(model, loader())
        assert not model.net[0].input_quantizer.calibrating

    def test_its_checkpoint_is_loaded_without_a_trainer_also_if_nobody_named_the_part(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        model = Net()
        prepare_qat(model.net, None, torch.randn(2, 2, 4, 4), inplace=True)
        trainer = make_trainer(callbacks=[QuantRetrainCallback()])
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = load_qat_checkpoint(Net, tmp_path / "a.ckpt")
        assert QuantRecord.from_model(loaded) == QuantRecord.from_model(model)


class TestConfigurationOfTheCheckpoint:
    @pytest.fixture
    def checkpoint(self, make_trainer: TrainerFactory, tmp_path: Path) -> Path:
        trainer = make_trainer(callbacks=[QuantRetrainCallback(config=INT16)])
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    def test_it_is_taken_if_none_is_given(self, make_trainer: TrainerFactory, checkpoint: Path, stage: str) -> None:
        model = Net()
        trainer = make_trainer(callbacks=[QuantRetrainCallback(search_n=stage == "fit")], max_epochs=3)
        getattr(trainer, stage)(model, loader(), ckpt_path=checkpoint)
        assert list(quantized_layers(model)) == ["net.0"]
        assert type(model.net[4]) is torch.nn.Linear
        assert model.net[0].input_quantizer.num_bits == 16
        assert not model.net[0].input_quantizer.calibrating

    def test_another_one_is_refused(self, make_trainer: TrainerFactory, checkpoint: Path) -> None:
        trainer = make_trainer(callbacks=[QuantRetrainCallback(config={"batch_num": 2})], max_epochs=3)
        with pytest.raises(ValueError, match=r"a\.ckpt' was quantized differently .*Leave `config` out"):
            trainer.fit(Net(), loader(), ckpt_path=checkpoint)

    def test_the_precision_mode_is_named_if_only_that_differs(
        self, make_trainer: TrainerFactory, checkpoint: Path
    ) -> None:
        config = RetrainConfig(fakequant_precision_mode="FORCE_FP16_QUANT", layers=INT16.layers)
        trainer = make_trainer(callbacks=[QuantRetrainCallback(config=config)], max_epochs=3)
        with pytest.raises(ValueError, match="fakequant_precision_mode is DEFAULT there and FORCE_FP16_QUANT here"):
            trainer.fit(Net(), loader(), ckpt_path=checkpoint)


class TestAnotherConfigurationOnAConvertedModel:
    @pytest.mark.parametrize(
        ("config", "difference"),
        [
            ("A4W4", "layer 'net.0': retrain_data_config.dst_type is INT16 there and INT4 here, "
             "retrain_weight_config.dst_type is INT8 there and INT4 here"),
            ({"skip_layers": ["net.0"], "activations": {"dst_type": "INT16"}},
             "layer 'net.0': retrain_enable is True there and False here"),
            ({"skip_layers": ["net.4"], "layers": {"net.0": {"activations": {"dst_type": "int16"}}}, "batch_num": 5},
             "batch_num is 1 there and 5 here"),
        ],
    )  # fmt: skip
    def test_only_what_differs_is_named(self, make_trainer: TrainerFactory, config: Any, difference: str) -> None:
        model = Net()
        make_trainer(callbacks=[QuantRetrainCallback(config=INT16)]).fit(model, loader())
        with pytest.raises(ValueError) as caught:
            make_trainer(callbacks=[QuantRetrainCallback(config=config)]).fit(model, loader())
        assert f"would do it differently: {difference} (there: as it is" in str(caught.value)

    def test_another_data_flow_is_named(self) -> None:
        x, linear = torch.ones(1, 4), torch.nn.Linear(4, 4)
        plans = [
            make_plan(torch.nn.Sequential(first, linear), None, x) for first in (torch.nn.ReLU(), torch.nn.Identity())
        ]
        assert describe_difference(*plans) == "data flow of layer '1': fixed_min is False there and True here"


def test_resuming_from_the_float_model_s_checkpoint_is_refused_with_the_remedy(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match=r"float\.ckpt' was written without .* fit without ckpt_path"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Net(), loader(), ckpt_path=tmp_path / "float.ckpt")


def test_a_training_that_ends_before_its_calibration_says_so(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    record = tmp_path / "record.txt"
    record.write_text("")
    callback = QuantRetrainCallback(config={"batch_num": 50}, record_file=record)
    with pytest.warns(UserWarning, match=r"2 of 2 .* after 8 training batches \('net\.0', 'net\.4'\).* older one"):
        make_trainer(callbacks=[callback]).fit(Net(), loader())


def test_nan_in_the_calibration_batch_is_told_at_once_and_does_not_stay_in_the_range(
    make_trainer: TrainerFactory,
) -> None:
    class Guarded(Net):
        """Skips the bad batch, as careful training loops do."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            if self.global_step == 0 and batch_idx == 0:
                x = x.clone()
                x[0, 0, 0, 0] = float("nan")
            loss = super().training_step((x, y), batch_idx)
            return None if batch_idx == 0 else loss

    model = Guarded()
    with pytest.warns(UserWarning, match=r"layer 'net\.0' \(step 0\)"):
        make_trainer(callbacks=[QuantRetrainCallback()], log_every_n_steps=50).fit(model, loader())
    assert all(torch.isfinite(q.clip_max) for q in activation_quantizers(model).values())


def test_the_config_file_is_not_overwritten_by_the_record(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    RetrainConfig(layers={"net.0": LayerConfig()}).to_json(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the configuration file"):
        make_trainer(callbacks=[QuantRetrainCallback(config=path, record_file=path)]).fit(Net(), loader())
    assert path.read_bytes() == before


def test_a_strategy_that_spawns_is_told_how_to_get_its_model(make_trainer: TrainerFactory) -> None:
    with pytest.warns(UserWarning, match="load_qat_checkpoint"):
        warn_spawned(make_trainer(strategy="ddp_spawn", devices=2))


def test_the_record_beside_a_checkpoint_is_mended_when_the_checkpoint_is_loaded(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    """A kill between the two writes leaves the record of the next checkpoint."""
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    record = tmp_path / "a.record.txt"
    good = record.read_text()
    record.write_text(good.replace("scale_d: 0.", "scale_d: 1."))
    make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=3).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert record.read_text() == good


def test_a_damaged_checkpoint_is_named(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(RuntimeError, match=r"bad\.ckpt' cannot be read"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Net(), loader(), ckpt_path=tmp_path / "bad.ckpt")


def test_checkpoints_follow_the_umask(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"batch_to_input": 5}, TypeError),
        ({"allow_reuse": "yes"}, TypeError),
        ({"search_n": 1}, TypeError),
        ({"record_file": 5}, TypeError),
        ({"record_file": ""}, TypeError),
        ({"submodule": ""}, TypeError),
    ],
)
def test_arguments_of_the_wrong_type_are_named(arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(arguments))):
        QuantRetrainCallback(**arguments)


@pytest.mark.parametrize("evaluate", [pl.Trainer.validate, pl.Trainer.test])
def test_shifts_found_outside_of_a_training_are_written_down(
    make_trainer: TrainerFactory, tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    model, record = Net(), tmp_path / "r.txt"
    make_trainer(callbacks=[QuantRetrainCallback(record_file=record, search_n=True)]).fit(model, loader())
    assert not any(layer.shift_bit for layer in QuantRecord.load(record).values())
    evaluate(make_trainer(callbacks=[QuantRetrainCallback(record_file=record, search_n=True)]), model, loader())
    assert all(layer.shift_bit for layer in QuantRecord.load(record).values())
