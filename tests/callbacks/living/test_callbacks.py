"""Beside Lightning's callbacks that stop, save, show and count."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.schedule.test_phases import Notes, per_epoch

DUE = {"start": 1, "freeze_data": 2, "freeze_weights": 2, "freeze_bn": 2}


def quantize(**settings: Any) -> QuantRetrainCallback:
    return QuantRetrainCallback(**{"schedule": DUE, **settings})


def train(make_trainer: TrainerFactory, callbacks: list[Any], model: Net | None = None, **settings: Any) -> pl.Trainer:
    trainer = make_trainer(callbacks=[quantize(), *callbacks], **{"max_epochs": 4, **settings})
    trainer.fit(model or Net(), loader(), loader(1))
    return trainer


def assert_has_its_record(checkpoint: Path) -> None:
    """Compare the record beside a checkpoint with that of the model in it; without a range there is none."""
    loaded = load_qat_checkpoint(Net(), checkpoint)
    record = checkpoint.with_name(checkpoint.name.removesuffix(".ckpt") + ".record.txt")
    if all(quantizer.has_range for quantizer in activation_quantizers(loaded).values()):
        assert QuantRecord.load(record) == QuantRecord.from_model(loaded)
    else:
        assert not record.exists()


class TestEarlyStopping:
    def test_the_record_is_that_of_where_it_stopped(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        model, notes = Net(), Notes()
        stop = EarlyStopping("val_loss", min_delta=1e3, patience=2)
        train(make_trainer, [notes, stop], model, max_epochs=20)
        assert stop.stopped_epoch == 2
        assert [epoch[-1] for epoch in per_epoch(notes.phases)] == [0, 2, 3]
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)

    def test_it_may_watch_the_phase(self, make_trainer: TrainerFactory) -> None:
        notes = Notes()
        stop = EarlyStopping(
            "quant_phase", stopping_threshold=2.5, mode="max", patience=20, check_on_train_epoch_end=True
        )
        train(make_trainer, [notes, stop], max_epochs=20)
        assert len(notes.phases) == 3 * BATCHES


class TestModelCheckpoint:
    @pytest.mark.parametrize(
        ("settings", "count"),
        [
            ({"save_top_k": 2, "monitor": "val_loss"}, 2),
            ({"save_top_k": 2, "monitor": "quant_phase", "mode": "max"}, 2),
            ({"save_top_k": -1, "every_n_train_steps": 3}, 5),
            ({"save_top_k": 1, "every_n_epochs": 2, "save_last": True}, 2),
            ({"save_top_k": -1, "save_weights_only": True}, 4),
            ({"save_top_k": 0, "save_last": True}, 1),
        ],
        ids=["best", "by phase", "steps", "last", "weights only", "only last"],
    )
    def test_each_has_its_record_and_no_other_is_left(
        self, make_trainer: TrainerFactory, tmp_path: Path, settings: dict[str, Any], count: int
    ) -> None:
        checkpoints = ModelCheckpoint(tmp_path / "c", "{epoch}-{step}", **settings)
        train(make_trainer, [checkpoints], enable_checkpointing=True)
        paths = sorted((tmp_path / "c").glob("*.ckpt"))
        assert len(paths) == count
        for path in paths:
            assert_has_its_record(path)
        records = {path.name.removesuffix(".record.txt") for path in (tmp_path / "c").glob("*.record.txt")}
        assert records <= {path.name.removesuffix(".ckpt") for path in paths}
        if "monitor" in settings:
            evaluation = make_trainer(callbacks=[QuantRetrainCallback()])
            loss = evaluation.validate(Net(), loader(1), ckpt_path=checkpoints.best_model_path, verbose=False)
            if settings["monitor"] == "val_loss":
                assert loss[0]["val_loss"] == pytest.approx(float(checkpoints.best_model_score), abs=1e-6)

    def test_a_last_one_that_is_a_link_has_the_record_of_what_it_points_to(
        self, make_trainer: TrainerFactory, tmp_path: Path
    ) -> None:
        for epochs in (3, 4):  # the second run points to something else
            checkpoints = ModelCheckpoint(
                tmp_path, "{epoch}", save_top_k=1, monitor="quant_phase", mode="max", save_last="link",
                enable_version_counter=False,
            )  # fmt: skip
            train(make_trainer, [checkpoints], enable_checkpointing=True, max_epochs=epochs)
            assert (tmp_path / "last.ckpt").is_symlink()
            assert_has_its_record(tmp_path / "last.ckpt")
            assert (tmp_path / "last.record.txt").exists()

    @pytest.mark.parametrize("step", [1, 5, 7, 10])
    def test_one_saved_on_an_exception_goes_on(self, make_trainer: TrainerFactory, tmp_path: Path, step: int) -> None:
        class Breaks(Net):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                if self.global_step == step:
                    raise RuntimeError("out of luck")
                return super().training_step(batch, batch_idx)

        checkpoints = ModelCheckpoint(tmp_path / "c", save_on_exception=True, save_last=True)
        with pytest.raises(RuntimeError, match="out of luck"):
            train(make_trainer, [checkpoints], Breaks(), enable_checkpointing=True)
        saved = max((tmp_path / "c").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        assert_has_its_record(saved)
        notes = Notes()
        trainer = make_trainer(callbacks=[quantize(), notes], max_epochs=4)
        trainer.fit(Net(), loader(), ckpt_path=saved)
        assert trainer.global_step >= 4 * BATCHES - 1
        assert notes.phases[-1] == 3


class Measured(CPUAccelerator):
    """A CPU with statistics, for which Lightning's own needs another package."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {"used": 7.0}


class TestWhatShowsAndCounts:
    def test_logged_values_are_unchanged_by_monitors(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        monitors: list[Any] = [LearningRateMonitor(logging_interval="step", log_weight_decay=True), RichProgressBar()]
        logger = CSVLogger(tmp_path, name="logs")
        trainer = make_trainer(
            callbacks=[quantize(quant_lr_scale=0.1), *monitors, DeviceStatsMonitor(cpu_stats=True)],
            accelerator=Measured(),
            max_epochs=3,
            logger=logger,
            log_every_n_steps=1,
            enable_progress_bar=True,
        )
        trainer.fit(Net(), loader(), loader(1))
        rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
        phases = [float(row["quant_phase"]) for row in rows if row["quant_phase"]]
        assert phases == [0] * 4 + [1, 2, 2, 2] + [3] * 4
        first = next(row for row in rows if row["lr-AdamW/pg1"])
        assert float(first["lr-AdamW/pg1"]) == 0.01
        assert float(first["lr-AdamW/pg2"]) == 0.001
        assert float(first["lr-AdamW/pg2-weight_decay"]) == 0
        assert any(value == "7.0" for row in rows for name, value in row.items() if "DeviceStatsMonitor" in name)

    @pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
    def test_summaries_of_the_quantized_model(self, make_trainer: TrainerFactory, summary: Any, capsys: Any) -> None:
        train(make_trainer, [summary(max_depth=-1)], max_epochs=1)
        text = capsys.readouterr().out + capsys.readouterr().err
        assert summary is ModelSummary or ("QATConv2d" in text and "ActivationQuantizer" in text)

    def test_a_timer_stops_the_run(self, make_trainer: TrainerFactory, tmp_path: Path) -> None:
        class Slow(Timer):
            """Every batch takes a second."""

            def time_elapsed(self, stage: Any = "train") -> float:
                return float(len(notes.phases))

        model, notes = Net(), Notes()
        train(make_trainer, [notes, Slow({"seconds": 6})], model)
        assert notes.phases == [0, 0, 0, 0, 1, 2]
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)

    def test_gradients_accumulated_by_a_schedule(self, make_trainer: TrainerFactory) -> None:
        notes = Notes()
        accumulate = GradientAccumulationScheduler({0: 1, 2: 2, 3: 4})
        callback = quantize(schedule={"update_every_n_steps": 2, "freeze_data": 3})
        trainer = make_trainer(callbacks=[callback, accumulate, notes], max_epochs=4)
        trainer.fit(Net(), loader())
        assert trainer.global_step == 4 + 4 + 2 + 1
        changed = [i for i in range(1, 16) if notes.clips[i] != notes.clips[i - 1]]
        assert changed == [2, 4, 6, 9]  # optimizer steps 2, 4, 6, 8; in step 10 the ranges are frozen

    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_clipped_gradients(self, make_trainer: TrainerFactory, tmp_path: Path, algorithm: str) -> None:
        """Frozen factors count for no norm."""
        grads: list[float] = []

        class Look(pl.Callback):
            def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
                given = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                if given:
                    flat = torch.cat([g.flatten() for g in given])
                    grads.append(float(flat.norm() if algorithm == "norm" else flat.abs().max()))

        model = Net()
        train(make_trainer, [Look()], model, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
        assert grads
        assert max(grads) <= 0.01 * 1.001
        if algorithm == "norm":
            assert min(grads) >= 0.01 * 0.99
        assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)
