"""Runs that are short, partial or repeated: limits, trial runs, evaluations before and after, several fits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from amct_lightning import QuantRecord, QuantRetrainCallback, QuantSchedule, quantized_layers
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.schedule.test_phases import Notes, per_epoch

DUE = {"start": 1, "freeze_data": 2, "freeze_weights": 2, "freeze_bn": 2}


def train(make_trainer: TrainerFactory, model: pl.LightningModule | None = None, **settings: Any) -> Notes:
    notes = Notes()
    callback = QuantRetrainCallback(settings.pop("config", None), schedule=settings.pop("schedule", DUE))
    data = settings.pop("data", loader())
    make_trainer(callbacks=[callback, notes], **settings).fit(model or Net(), data, loader(1))
    return notes


def is_calibrated(model: torch.nn.Module) -> bool:
    return not any(quantizer.calibrating for quantizer in activation_quantizers(model).values())


class TestFastDevRun:
    def test_it_leaves_a_good_record_alone(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        record = tmp_path / "r.txt"
        make_trainer(callbacks=[QuantRetrainCallback(record_file=record)]).fit(Net(), loader())
        good = record.read_text()
        make_trainer(callbacks=[QuantRetrainCallback(record_file=record)], fast_dev_run=2).fit(Net(), loader(1))
        assert record.read_text() == good

    @pytest.mark.parametrize("config", [None, {"batch_num": 3}])
    def test_it_writes_and_says_nothing(self, make_trainer: TrainerFactory, tmp_path: Path, config: Any) -> None:
        model = Net()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(callbacks=[QuantRetrainCallback(config, schedule=QuantSchedule())], fast_dev_run=1)
            trainer.fit(model, loader(), loader(1))
            trainer.validate(model, loader(1))
        assert list(tmp_path.iterdir()) == []
        assert not any("ecord" in str(w.message) for w in caught)
        assert is_calibrated(model) == (config is None)

    def test_it_finds_what_is_wrong_with_the_schedule(self, make_trainer: TrainerFactory) -> None:
        callback = QuantRetrainCallback(schedule=QuantSchedule(layers={"head": {"freeze_data": 1}}))
        with pytest.raises(ValueError, match="'head' fits no quantized layer"):
            make_trainer(callbacks=[callback], fast_dev_run=True).fit(Net(), loader())

    def test_a_checkpoint_saved_by_hand_after_it_has_its_record(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        trainer = make_trainer(callbacks=[QuantRetrainCallback()], fast_dev_run=True)
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "a.record.txt"}


class TestLimits:
    def test_share_of_the_batches(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, max_epochs=4, limit_train_batches=0.5, limit_val_batches=0.5)
        assert notes.phases == [0, 0, 1, 2, 3, 3, 3, 3]

    def test_number_of_batches_below_that_of_the_calibration(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, config={"batch_num": 3}, schedule=None, limit_train_batches=2)
        assert notes.phases == [1, 1, 1, 2]

    @pytest.mark.parametrize("limits", [{"limit_train_batches": 0}, {"limit_train_batches": 0.0}])
    def test_no_training_batches_at_all(
        self, make_trainer: TrainerFactory, tmp_path: Path, limits: dict[str, Any]
    ) -> None:
        model = Net()
        notes = train(make_trainer, model, **limits)
        assert notes.phases == []
        assert not (tmp_path / "record.txt").exists()
        assert len(quantized_layers(model)) == 2

    def test_no_validation_batches(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, max_epochs=3, limit_val_batches=0)
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [0, 2, 3]

    def test_limits_of_evaluations(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        settings = {"limit_test_batches": 0, "limit_predict_batches": 0.5, "limit_val_batches": 1}
        trainer = make_trainer(callbacks=[QuantRetrainCallback()], **settings)
        trainer.fit(model, loader())
        trainer.test(model, loader())
        assert len(trainer.predict(model, loader())) == BATCHES // 2
        assert "val_loss" in trainer.validate(model, loader())[0]

    @pytest.mark.parametrize("batches", [1, 0.5])
    def test_overfit_batches(self, make_trainer: TrainerFactory, tmp_path: Path, batches: float) -> None:
        model = Net()
        train(make_trainer, model, max_epochs=30, overfit_batches=batches, schedule={"freeze_bn": 25})
        x, y = next(iter(loader()))
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.8
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)


class TestLengthOfTheTraining:
    def test_by_steps_alone(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, max_epochs=-1, max_steps=10)
        assert notes.phases == [0] * 4 + [1, 2, 2, 2] + [3] * 2

    def test_by_steps_alone_shares_of_epochs_are_refused(self, make_trainer: TrainerFactory) -> None:
        with pytest.raises(ValueError, match=r"freeze_data=0\.5.*Set max_epochs"):
            train(make_trainer, schedule={"freeze_data": 0.5}, max_epochs=-1, max_steps=10)

    def test_by_a_time_that_is_over_at_once(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        model = Net()
        train(make_trainer, model, schedule=None)
        before = (tmp_path / "record.txt").read_text()
        notes = train(make_trainer, model, max_epochs=-1, max_time={"seconds": 0})
        assert notes.phases == []
        assert (tmp_path / "record.txt").read_text() == before

    def test_at_least_some_epochs(self, make_trainer: TrainerFactory) -> None:
        class Impatient(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                trainer.should_stop = True

        callbacks = [QuantRetrainCallback(schedule=DUE), notes := Notes(), Impatient()]
        make_trainer(callbacks=callbacks, max_epochs=9, min_epochs=3).fit(Net(), loader())
        assert notes.phases == [0] * 4 + [1, 2, 2, 2] + [3] * 4

    def test_a_limit_of_steps_within_an_epoch(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        model = Net()
        notes = train(make_trainer, model, max_epochs=4, max_steps=6)
        assert notes.phases == [0, 0, 0, 0, 1, 2]
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)


class TestData:
    def test_loaders_that_are_made_anew(self, make_trainer: TrainerFactory) -> None:
        class Reloading(Net):
            made = 0

            def train_dataloader(self) -> Any:
                self.made += 1
                return loader(self.made)

        model, notes = Reloading(), Notes()
        callbacks = [QuantRetrainCallback(schedule=DUE | {"calibrate_batches": 5}), notes]
        make_trainer(callbacks=callbacks, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(model)
        assert model.made == 1 + 4  # the first one to see the data flow
        assert per_epoch(notes.phases) == [[0] * 4, [1] * 4, [1, 3, 3, 3], [3] * 4]
        assert len(set(notes.clips[2 * BATCHES :])) == 1

    @pytest.mark.parametrize("interval", [0.25, 0.5, 2])
    def test_validation_within_the_epochs(self, make_trainer: TrainerFactory, interval: float) -> None:
        """It neither calibrates nor trains anything, nor does it thaw a batch normalization."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The model is evaluated before", append=False)
            within = train(make_trainer, max_epochs=4, val_check_interval=interval, num_sanity_val_steps=0)
            after = train(make_trainer, max_epochs=4, num_sanity_val_steps=0)
        assert within.phases == after.phases
        assert within.clips == after.clips
        assert within.norm_training == after.norm_training

    def test_validation_across_epochs(self, make_trainer: TrainerFactory) -> None:
        notes = train(make_trainer, max_epochs=4, val_check_interval=6, check_val_every_n_epoch=None)
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [0, 2, 3, 3]


class TestEvaluationsAroundFit:
    @pytest.mark.parametrize("inference_mode", [True, False])
    def test_before_during_and_after(self, make_trainer: TrainerFactory, tmp_path: Path, inference_mode: bool) -> None:
        model, record = Net(), tmp_path / "record.txt"
        trainer = make_trainer(
            callbacks=[QuantRetrainCallback(record_file=record)], inference_mode=inference_mode, max_epochs=3
        )
        float_loss = make_trainer().validate(Net(), loader(), verbose=False)
        with pytest.warns(UserWarning, match="run in float"):
            assert trainer.validate(model, loader(), verbose=False) == float_loss
        assert not record.exists()
        trainer.fit(model, loader(), loader())
        during = trainer.callback_metrics["val_loss"]
        text = record.read_text()
        after = trainer.validate(model, loader(), verbose=False)[0]["val_loss"]
        assert after == pytest.approx(float(during), abs=1e-6)
        assert trainer.test(model, loader(), verbose=False)[0]["test_loss"] == pytest.approx(after)
        outputs = torch.cat(trainer.predict(model, loader()))
        with torch.no_grad():
            assert torch.equal(outputs, torch.cat([model.eval()(x) for x, _ in loader()]))
        assert record.read_text() == text

    def test_validation_before_fit_changes_nothing_of_the_training(self, make_trainer: TrainerFactory) -> None:
        def trained(validate: bool) -> dict[str, torch.Tensor]:
            model = Net()
            trainer = make_trainer(callbacks=[QuantRetrainCallback(schedule=DUE)], max_epochs=3)
            if validate:
                with pytest.warns(UserWarning, match="run in float"):
                    trainer.validate(model, loader(), verbose=False)
            trainer.fit(model, loader())
            return model.state_dict()

        one, two = trained(True), trained(False)
        assert all(torch.equal(one[name], two[name]) for name in two)


class TestSeveralFits:
    def test_with_one_trainer_the_schedule_goes_on(self, make_trainer: TrainerFactory) -> None:
        model, notes = Net(), Notes()
        trainer = make_trainer(callbacks=[QuantRetrainCallback(schedule=DUE), notes], max_epochs=2)
        trainer.fit(model, loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, loader())
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [0, 2, 3, 3]

    def test_with_new_trainers_it_begins_again_with_the_ranges_there_are(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        first = train(make_trainer, model, max_epochs=4)
        second = train(make_trainer, model, max_epochs=4)
        assert second.phases == [0] * 4 + [2] * 4 + [3] * 8
        assert set(second.clips[:BATCHES]) == {first.clips[-1]}
        assert len(set(second.clips[BATCHES : 2 * BATCHES])) == BATCHES
        assert len(set(second.clips[2 * BATCHES :])) == 1

    def test_the_schedule_goes_on_from_a_checkpoint_that_brings_the_configuration(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        config = {"skip_layers": ["net.0"], "weights": {"algo": "ulq_retrain"}, "batch_num": 6}

        def train(configuration: Any, epochs: int, resume: Path | None = None) -> Net:
            model = Net()
            trainer = make_trainer(callbacks=[QuantRetrainCallback(configuration, schedule=DUE)], max_epochs=epochs)
            trainer.fit(model, loader(), ckpt_path=resume)
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return model

        expected = train(config, 4).state_dict()
        for epochs in (1, 2, 3):  # in float, in the calibration, frozen
            train(config, epochs)
            resumed = train(None, 4, tmp_path / f"{epochs}.ckpt").state_dict()
            assert all(torch.equal(resumed[name], value) for name, value in expected.items())
