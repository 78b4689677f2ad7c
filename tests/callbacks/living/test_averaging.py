"""Beside callbacks that average weights: averages of calibrated factors, frozen factors as they are, phases in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from amct_lightning import QuantRecord, QuantRetrainCallback, QuantSchedule, load_qat_checkpoint, quantized_layers
from amct_lightning.callbacks.averaging import averaged_modules
from amct_lightning.modules import activation_quantizers
from tests.callbacks.checkpoints.test_resume_phases import assert_same
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.schedule.test_freezing import factors

ULQ = {"weights": {"algo": "ulq_retrain"}}
FROZEN = QuantSchedule(start=1, freeze_data=2, freeze_weights=2, freeze_bn=2)


def ema(decay: float = 0.9, **settings: Any) -> pl.Callback:
    return EMAWeightAveraging(decay=decay, **settings)


def swa(start: int = 2, **settings: Any) -> pl.Callback:
    return StochasticWeightAveraging(0.01, swa_epoch_start=start, annealing_epochs=1, **settings)


def at(path: Path, epoch: int) -> tuple[Net, Path]:
    """Return the model in the checkpoint of an epoch, and where its record is."""
    return load_qat_checkpoint(Net(), path / f"epoch={epoch}.ckpt"), path / f"epoch={epoch}.record.txt"


def every_epoch(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False)


class Evaluated(pl.Callback):
    """Notes the factors that are evaluated, and those in training at the beginning and the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.began: list[dict[str, Tensor]] = []
        self.live: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 0:
            self.began.append(factors(pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.live.append(factors(pl_module))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(factors(pl_module))


class TestMovingAverage:
    def test_it_begins_with_the_calibrated_range(self, make_trainer: TrainerFactory) -> None:
        """The placeholders of before, 1 and -1, must not be part of it; a decay near 1 would keep them for long."""
        seen: list[tuple[Tensor, Tensor]] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
                (average,) = averaged_modules(trainer)
                for module in (pl_module, average):
                    layer = module.net[0]
                    seen.append((layer.input_quantizer.clip_max.clone(), layer.weight_quantizer.scale.clone()))

        callbacks = [QuantRetrainCallback(ULQ, schedule={"start": 1}), ema(0.9999), Look()]
        make_trainer(callbacks=callbacks, max_epochs=2).fit(Net(), loader())
        live, average = seen[2 * BATCHES], seen[2 * BATCHES + 1]
        torch.testing.assert_close(average, live, rtol=1e-4, atol=0)
        assert live[0] > 1.5

    @pytest.mark.parametrize("config", [{"batch_num": 3}, {"batch_num": 3, **ULQ}], ids=["arq", "ulq"])
    def test_frozen_factors_are_in_it_as_they_are(
        self, make_trainer: TrainerFactory, tmp_path: Path, config: Any
    ) -> None:
        """Counts and flags are no numbers to be averaged: 0.9 * 3 + 0.1 * 3 is below 3."""
        evaluated = Evaluated()
        callback = QuantRetrainCallback(config, tmp_path / "r.txt", schedule=FROZEN)
        trainer = make_trainer(
            callbacks=[callback, ema(), evaluated, every_epoch(tmp_path)], max_epochs=5, enable_checkpointing=True
        )
        model = Net()
        trainer.fit(model, loader(), loader(1))
        clip = "net.4.input_quantizer.clip_max"  # before it is frozen, an average is saved and evaluated
        assert evaluated.seen[2 * BATCHES - 1][clip] == factors(at(tmp_path, 1)[0])[clip] != evaluated.live[1][clip]
        for epoch in range(2, 5):
            loaded, record = at(tmp_path, epoch)
            for found in (factors(loaded), evaluated.seen[(epoch + 1) * BATCHES - 1]):
                assert all(torch.equal(value, evaluated.live[epoch][name]) for name, value in found.items())
            assert QuantRecord.load(record) == QuantRecord.from_model(loaded)
            assert not torch.equal(loaded.net[4].weight, model.net[4].weight) or epoch == 4
        assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model)

    def test_scales_learn_again_in_it_after_they_do_in_the_model(self, make_trainer: TrainerFactory) -> None:
        """The average of a flag that was once true would stay true."""
        model = Net()
        schedule = QuantSchedule(update_every_n_epochs=2, freeze_bn=0)
        trainer = make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule), ema()], max_epochs=3)
        trainer.fit(model, loader())
        assert not any(layer.weight_quantizer.scale_frozen for layer in quantized_layers(model).values())
        (average,) = averaged_modules(trainer)
        assert not any(layer.weight_quantizer.scale_frozen for layer in quantized_layers(average).values())

    def test_a_calibration_over_an_old_one_begins_it_anew(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        evaluated = Evaluated()
        callbacks = [
            QuantRetrainCallback(schedule=QuantSchedule(calibrate=[0, 2], calibrate_batches=4)),
            ema(0.9999),
            evaluated,
            every_epoch(tmp_path),
        ]
        make_trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=True).fit(Net(), loader(), loader(1))
        average, live = evaluated.seen[-1], evaluated.live[-1]
        name = "net.4.input_quantizer.clip_max"
        torch.testing.assert_close(average[name], live[name], rtol=1e-3, atol=0)
        loaded, record = at(tmp_path, 2)
        assert QuantRecord.load(record) == QuantRecord.from_model(loaded)

    @pytest.mark.parametrize("config", [{"skip_layers": ["net.0"]}, None], ids=["by checkpoint", "given"])
    @pytest.mark.parametrize("average", [ema, swa])
    def test_a_run_goes_on_to_the_bit(
        self, make_trainer: TrainerFactory, tmp_path: Path, average: Any, config: Any
    ) -> None:
        """Also out of a calibration, and if only the checkpoint knows which layers are quantized."""

        def train(out: Path, configuration: Any, resume: Path | None = None) -> None:
            schedule = QuantSchedule(calibrate_batches=BATCHES + 2, freeze_data=2, freeze_bn=3)
            callback = QuantRetrainCallback(configuration, out / "record.txt", schedule=schedule)
            trainer = make_trainer(
                callbacks=[callback, average(), every_epoch(out)], max_epochs=4, enable_checkpointing=True
            )
            trainer.fit(Net(), loader(), ckpt_path=resume)

        train(tmp_path / "whole", config)
        for epoch in range(3):
            train(tmp_path / f"{epoch}", None, tmp_path / "whole" / f"epoch={epoch}.ckpt")
            assert_same(tmp_path / "whole", tmp_path / f"{epoch}")


class NoBatchNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()


class TestStochasticAverage:
    def test_it_is_the_mean_of_calibrated_ranges(self, make_trainer: TrainerFactory) -> None:
        """Without batch normalization SWA takes the mean over the states at the beginning of its epochs."""
        clips: list[float] = []

        class Look(pl.Callback):
            def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
                clips.append(pl_module.net[4].input_quantizer.clip_max.item())

        model = NoBatchNorm()
        callbacks = [QuantRetrainCallback(), Look(), swa(2)]
        make_trainer(callbacks=callbacks, max_epochs=4).fit(model, loader())
        assert model.net[4].input_quantizer.clip_max.item() == pytest.approx(sum(clips[1:]) / 3)

    @pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
    @pytest.mark.parametrize("kind", [Net, NoBatchNorm])
    def test_frozen_factors_are_in_it_as_they_are(
        self, make_trainer: TrainerFactory, tmp_path: Path, kind: type[Net], config: Any
    ) -> None:
        """Also the statistics of a frozen batch normalization, which SWA sets to zero for an extra epoch."""
        evaluated, model = Evaluated(), kind()
        callback = QuantRetrainCallback(config, tmp_path / "r.txt", schedule=FROZEN)
        checkpoints = [every_epoch(tmp_path)] if config else []
        callbacks = [callback, swa(2), evaluated, *checkpoints]
        trainer = make_trainer(callbacks=callbacks, max_epochs=5, enable_checkpointing=bool(checkpoints))
        trainer.fit(model, loader())
        for found in (factors(model), evaluated.began[-1]):  # the last epoch may be the extra one
            assert all(torch.equal(value, evaluated.live[2][name]) for name, value in found.items())
        assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model)
        if kind is Net and checkpoints:
            loaded, record = at(tmp_path, 5)
            assert QuantRecord.load(record) == QuantRecord.from_model(loaded) == QuantRecord.from_model(model)

    def test_a_free_batch_norm_gets_the_statistics_of_the_averaged_weights(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        means: list[Tensor] = []
        model.net[0].register_forward_hook(lambda _, args, output: means.append(output.detach().mean((0, 2, 3))))
        make_trainer(callbacks=[QuantRetrainCallback(), swa(2)], max_epochs=4).fit(model, loader())
        assert model.net[1].num_batches_tracked == BATCHES
        torch.testing.assert_close(model.net[1].running_mean, torch.stack(means[-BATCHES:]).mean(0))

    def test_shares_of_the_training_do_not_count_its_extra_epoch(self, make_trainer: TrainerFactory) -> None:
        seen: list[int] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
                seen.append(int(trainer.callback_metrics["quant_phase"]))

        schedule = QuantSchedule(start=0.25, freeze_data=0.75, freeze_weights=0.75, freeze_bn=0.75)
        callbacks = [QuantRetrainCallback(schedule=schedule), swa(2), Look()]
        make_trainer(callbacks=callbacks, max_epochs=4).fit(Net(), loader())
        assert seen[::BATCHES] == [0, 1, 2, 3, 3]

    def test_nothing_is_calibrated_in_its_extra_epoch(self, make_trainer: TrainerFactory) -> None:
        model = Net()
        schedule = QuantSchedule(calibrate=[0, 4], calibrate_batches=BATCHES + 1)
        trainer = make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule), swa(2)], max_epochs=4)
        trainer.fit(model, loader())
        assert not any(quantizer.calibrating for quantizer in activation_quantizers(model).values())

    def test_a_run_that_is_resumed_for_its_extra_epoch_keeps_the_frozen_statistics(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        def trained(resume: Path | None) -> Net:
            model = Net()
            callbacks = [QuantRetrainCallback(schedule=FROZEN), swa(2), every_epoch(tmp_path)]
            trainer = make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
            trainer.fit(model, loader(), ckpt_path=resume)
            return model

        whole, resumed = trained(None), trained(tmp_path / "epoch=3.ckpt")
        assert whole.net[1].running_mean.any()
        assert all(torch.equal(value, factors(resumed)[name]) for name, value in factors(whole).items())


def test_with_decay_by_a_function_of_ones_own(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class ByEpoch(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    model = Net()
    average = ByEpoch(use_buffers=False, avg_fn=get_ema_avg_fn(0.5))
    trainer = make_trainer(
        callbacks=[QuantRetrainCallback(ULQ, tmp_path / "r.txt", schedule=FROZEN), average, every_epoch(tmp_path)],
        max_epochs=4,
        enable_checkpointing=True,
    )
    trainer.fit(model, loader())
    assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model)
    loaded, record = at(tmp_path, 3)
    assert QuantRecord.load(record) == QuantRecord.from_model(loaded)


@pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
def test_with_lightnings_default_the_mean_of_all_steps(
    make_trainer: TrainerFactory, tmp_path: Path, config: dict[str, Any] | None
) -> None:
    model = Net()
    callbacks = [
        QuantRetrainCallback(config, tmp_path / "r.txt", schedule=FROZEN),
        WeightAveraging(),
        every_epoch(tmp_path),
    ]
    make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True).fit(model, loader())
    assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model)
    loaded, record = at(tmp_path, 3)
    assert QuantRecord.load(record) == QuantRecord.from_model(loaded)
    frozen = [getattr(layer.weight_quantizer, "frozen", False) for layer in quantized_layers(loaded).values()]
    assert frozen == [config is None] * 2
