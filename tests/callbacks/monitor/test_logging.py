"""What QuantMonitor gives to loggers."""

from __future__ import annotations

import csv
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.logging import WorstLayers, model_scalars, tag
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.callbacks.schedule.schedule import Phase
from amct_lightning.monitor_format import FILE_NAME, PHASES, LayerReading
from tests.callbacks.conftest import Net, TrainerFactory, loader


def test_the_phases_have_the_names_that_are_written_down() -> None:
    assert [phase.name.lower() for phase in Phase] == list(PHASES)
    assert list(Phase) == list(range(len(PHASES)))


def _readings(**values: float) -> list[LayerReading]:
    return [LayerReading(name, sqnr_input_db=value) for name, value in values.items()]


def test_a_layer_keeps_its_curve_when_others_become_worse() -> None:
    worst = WorstLayers(1)
    assert set(worst.scalars(_readings(a=1.0, b=2.0, c=3.0))) == {"quant/sqnr_input_db/a"}
    assert set(worst.scalars(_readings(a=4.0, b=2.0, c=3.0))) == {"quant/sqnr_input_db/a", "quant/sqnr_input_db/b"}
    assert set(worst.scalars(_readings(a=4.0, b=5.0, c=6.0))) == {"quant/sqnr_input_db/a", "quant/sqnr_input_db/b"}


def test_saturation_and_drift_are_bad_if_high_and_not_at_all_if_zero() -> None:
    readings = [
        LayerReading("calm", saturation_low=0.0, saturation_high=0.0, clip_drift=0.0, weight_scale_drift=0.0),
        LayerReading("some", saturation_low=0.1, saturation_high=0.0, clip_drift=0.2, weight_scale_drift=0.0),
        LayerReading("more", saturation_low=0.1, saturation_high=0.2, clip_drift=0.1, weight_scale_drift=0.0),
    ]
    assert WorstLayers(1).scalars(readings) == {
        "quant/saturation/more": pytest.approx(0.3),
        "quant/clip_drift/some": 0.2,
    }
    assert WorstLayers(3).scalars(readings).keys() == {
        "quant/saturation/more",
        "quant/saturation/some",
        "quant/clip_drift/some",
        "quant/clip_drift/more",
    }
    assert model_scalars(readings)["quant/weight_scale_drift_max"] == 0.0


def test_only_finite_numbers_are_logged() -> None:
    readings = [*_readings(exact=math.inf, a=10.0, b=30.0), LayerReading("unknown")]
    assert model_scalars(readings) == {"quant/sqnr_input_db_min": 10.0, "quant/sqnr_input_db_mean": 20.0}
    assert WorstLayers(9).scalars(readings) == {"quant/sqnr_input_db/a": 10.0, "quant/sqnr_input_db/b": 30.0}
    assert model_scalars([LayerReading("unknown")]) == {}


def test_names_are_such_that_tensorboard_takes_them() -> None:
    assert tag("a.lstm (hidden state)") == "a.lstm.hidden_state"


class Logging(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def _fit(make_trainer: TrainerFactory, logger: Logger, log_every_n_steps: int = 2, **kwargs: Any) -> QuantMonitor:
    monitor = QuantMonitor(**{"worst_k": 1, "verbose": False, **kwargs})
    callbacks = [QuantRetrainCallback(), monitor]
    trainer = make_trainer(callbacks=callbacks, logger=logger, max_epochs=3, log_every_n_steps=log_every_n_steps)
    trainer.fit(Logging(), loader())
    return monitor


def test_the_csv_logger_has_every_curve_without_holes(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    monitor = _fit(make_trainer, logger)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quant/sqnr_input_db_min"]]
    assert [row["step"] for row in rows] == ["1", "3", "5", "7", "9", "11"]
    for reading in monitor.summary().readings:
        found = [float(row[f"quant/sqnr_input_db/{reading.layer}"] or "nan") for row in rows]
        first = next((i for i, value in enumerate(found) if not math.isnan(value)), len(found))
        assert not any(map(math.isnan, found[first:]))
    last = min(reading.sqnr_input_db for reading in monitor.summary().readings)
    assert float(rows[-1]["quant/sqnr_input_db_min"]) == pytest.approx(last)


def test_the_steps_are_those_of_other_curves(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    _fit(make_trainer, logger)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [{row["step"] for row in rows if row[name]} for name in ("train_loss", "quant/saturation_max")]
    assert steps[0] == steps[1]


def test_an_interval_of_its_own_is_logged_at_its_own_steps(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    _fit(make_trainer, logger, log_every_n_steps=2, every_n_steps=5)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["quant/sqnr_input_db_min"]] == ["4", "9"]


def test_the_file_is_beside_that_of_the_logger_which_does_not_complain(
    make_trainer: TrainerFactory, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    logger = CSVLogger(tmp_path)
    _fit(make_trainer, logger)
    assert {path.name for path in Path(logger.log_dir).iterdir()} >= {FILE_NAME, "metrics.csv"}
    assert not [w for w in recwarn if "exists and is not empty" in str(w.message)]


@pytest.mark.parametrize("histograms", [True, False])
def test_tensorboard_has_scalars_and_histograms(make_trainer: TrainerFactory, tmp_path: Path, histograms: bool) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitor = _fit(make_trainer, logger, histograms=histograms)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    scalars = events.scalars.Items("quant/sqnr_weight_db_min")
    assert [event.step for event in scalars] == [1, 3, 5, 7, 9, 11]
    worst = min(monitor.summary().readings, key=lambda reading: reading.sqnr_weight_db or 0)
    assert events.scalars.Items(f"quant/sqnr_weight_db/{worst.layer}")[-1].value == pytest.approx(worst.sqnr_weight_db)
    if not histograms:
        assert events.Tags()["histograms"] == []
        return
    assert {"quant/clip_max", "quant/clip_min", f"quant/weight_scale/{worst.layer}"} <= set(events.Tags()["histograms"])
    value = events.histograms.Items("quant/clip_max")[-1].histogram_value
    assert value.num == 2
    assert value.max == pytest.approx(max(reading.clip_max for reading in monitor.summary().readings))


class WandbLogger(Logger):
    """Takes what the logger of Weights & Biases takes."""

    def __init__(self, folder: Path) -> None:
        self.save_dir = str(folder)
        self.got: list[tuple[dict[str, Any], int | None]] = []

    name = version = None
    save_dir: Any

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.got.append((metrics, step))

    def log_hyperparams(self, *args: Any) -> None:
        pass


def test_weights_and_biases_gets_histograms_of_its_own_kind(
    make_trainer: TrainerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = types.ModuleType("wandb")
    wandb.Histogram = lambda values: ("histogram", sorted(values.tolist()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    WandbLogger.save_dir = None
    logger = WandbLogger(tmp_path)
    monitor = _fit(make_trainer, logger, every_n_steps=12)
    found = {name: (value, step) for metrics, step in logger.got for name, value in metrics.items()}
    clips = sorted(reading.clip_max for reading in monitor.summary().readings)
    assert found["quant/clip_max"] == (("histogram", pytest.approx(clips)), 11)
    assert found["quant/sqnr_input_db_min"][1] == 11
    assert (tmp_path / FILE_NAME).exists()
