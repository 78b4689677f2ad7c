"""Runs that TensorBoardLogger wrote, alone or beside another logger, and runs that share a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from amct_lightning import QuantMonitor, QuantRetrainCallback
from amct_lightning.monitor_format import FILE_NAME
from amct_lightning.run_report.sources import load_run
from tests.callbacks.conftest import Net, loader
from tests.run_report.conftest import report, write_monitor


class Logging(Net):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):  # writes folders below its own
                logger.experiment.add_scalars("parts", {"a": 1.0, "b": 2.0}, self.global_step)
        return loss


def run(folder: Path, *loggers: Logger, lr: float = 1e-2, every: int = 2, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=list(loggers),
        default_root_dir=folder,
        callbacks=[
            QuantRetrainCallback(record_file=folder / "record.txt"),
            QuantMonitor(every_n_steps=every, verbose=False),
            ModelCheckpoint(),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(Logging(lr), loader(), loader(1))
    for logger in loggers:
        logger.finalize("success")
    return trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with TensorBoardLogger, which QuantMonitor and ModelCheckpoint write beside, and CSVLogger."""
    folder = tmp_path_factory.mktemp("both")
    run(folder, TensorBoardLogger(folder / "tb"), CSVLogger(folder / "csv"))
    return folder


def test_the_metrics_are_those_that_csv_logger_has(both: Path) -> None:
    events, table = load_run(both / "tb"), load_run(both / "csv")
    assert {"train_loss", "val_loss"} <= events.logged.keys()
    assert events.metrics.keys() == table.metrics.keys()
    for name, series in events.metrics.items():
        assert list(series) == list(table.metrics[name])
        assert list(series.values()) == pytest.approx(list(table.metrics[name].values()), rel=2**-23)
    assert events.phases == table.phases


def test_a_folder_of_tensorboard_has_the_whole_report(both: Path) -> None:
    page = report(next((both / "tb").rglob("version_0")))
    assert {"#curves", "#ranges", "#sqnr", "#scales"} <= set(page.attributes("href"))
    assert page.facts["phase at the end"] == "learning"


def test_folders_of_two_loggers_are_one_run(both: Path) -> None:
    found = load_run(both)
    assert found.monitor.keys() == {"net.0", "net.4"}
    assert found.metrics == load_run(both / "csv").metrics
    assert found.checkpoint is not None
    assert not [note for note in found.notes if "Left out" in note]


def test_two_loggers_that_number_their_folders_side_by_side_are_one_run(tmp_path: Path) -> None:
    run(tmp_path, TensorBoardLogger(tmp_path, "logs", version=0), CSVLogger(tmp_path, "logs", version=1))
    found = load_run(tmp_path / "logs")
    assert found.monitor.keys() == {"net.0", "net.4"}
    assert {"train_loss", "val_loss"} <= found.logged.keys()
    assert found.checkpoint is not None
    assert found.notes == []


def test_of_several_runs_with_two_loggers_the_newest_is_shown(tmp_path: Path) -> None:
    for lr, every in ((1e-2, 1), (1e-3, 4)):
        run(tmp_path, TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv"), lr=lr, every=every)
    found = load_run(tmp_path)
    assert found.metrics == load_run(tmp_path / "csv" / "lightning_logs" / "version_1").metrics
    assert list(found.monitor["net.0"]["scale"]) == [4, 8]
    assert any("version_0" in note for note in found.notes)


def test_what_is_missing_to_read_events_is_named(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    found = load_run(both / "tb")
    assert found.metrics == {}
    assert found.monitor.keys() == {"net.0", "net.4"}
    assert [note for note in found.notes if "pip install tensorboard" in note]
    with_table = load_run(both)
    assert {"train_loss", "val_loss"} <= with_table.logged.keys()
    assert with_table.monitor.keys() == {"net.0", "net.4"}


def test_a_damaged_event_file_is_noted_or_read_as_far_as_it_goes(both: Path, tmp_path: Path) -> None:
    events = next((both / "tb").rglob("events.out.tfevents.*")).read_bytes()
    for number, content in enumerate((b"", b"no events at all", events[: len(events) // 2], os.urandom(500))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "events.out.tfevents.1.host").write_bytes(content)
        write_monitor(folder, [{"step": 10, "epoch": 0, "layer": "fc", "clip_max": 1}])
        assert list(load_run(folder).monitor) == ["fc"]


def test_of_runs_that_share_a_folder_the_newest_is_shown(tmp_path: Path) -> None:
    for every in (4, 2):
        run(tmp_path, every=every)
    found = load_run(tmp_path)
    assert list(found.monitor["net.0"]["scale"]) == [2, 4, 6, 8]
    assert any(note.startswith(f"{FILE_NAME}: left out") for note in found.notes)
