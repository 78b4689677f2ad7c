"""The file quant_monitor.csv: complete lines, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.file import MonitorFile
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.monitor_format import COLUMNS, FILE_NAME, LayerReading
from tests.callbacks.conftest import Net, TrainerFactory, loader

READINGS = [LayerReading("a", clip_max=1.5, offset=-0.0), LayerReading('b,"c', sqnr_input_db=float("inf"))]


@pytest.fixture
def file(tmp_path: Path) -> MonitorFile:
    file = MonitorFile(tmp_path / "logs" / FILE_NAME)
    file.begin(0)
    return file


def _steps(file: MonitorFile) -> list[str]:
    return [line.split(",")[0] for line in file.path.read_text().splitlines()[1:]]


def test_the_columns_are_those_of_the_documentation() -> None:
    assert ",".join(COLUMNS) == (
        "step,epoch,layer,clip_max,clip_min,scale,offset,saturation_low,saturation_high,utilisation,sqnr_input_db,"
        "sqnr_weight_db,weight_scale_mean,clip_drift,weight_scale_drift"
    )


def test_cells_are_plain_numbers_or_empty(file: MonitorFile) -> None:
    file.append(50, 1, READINGS)
    assert file.path.read_text().splitlines()[1:] == [
        "50,1,a,1.5,,,0,,,,,,,,",
        '50,1,"b,""c",,,,,,,,inf,,,,',
    ]


def test_later_steps_are_dropped(file: MonitorFile) -> None:
    for step in (50, 100, 150):
        file.append(step, 0, READINGS)
    MonitorFile(file.path).begin(100)
    assert _steps(file) == ["50", "50", "100", "100"]


def test_no_half_line_is_kept_wherever_it_was_cut(file: MonitorFile) -> None:
    file.append(50, 0, READINGS)
    whole = file.path.read_bytes()
    file.append(100, 0, READINGS[:1])
    longer = file.path.read_bytes()
    for length in range(len(whole), len(longer)):
        file.path.write_bytes(longer[:length])
        MonitorFile(file.path).begin(200)
        assert file.path.read_bytes() == whole
    file.append(100, 0, READINGS[:1])
    assert file.path.read_bytes() == longer


def test_a_file_that_is_as_it_should_be_is_left_alone(file: MonitorFile) -> None:
    file.append(50, 0, READINGS)
    before = file.path.stat().st_ino
    MonitorFile(file.path).begin(50)
    assert file.path.stat().st_ino == before


def test_a_foreign_file_is_refused_and_kept(file: MonitorFile) -> None:
    file.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"quant_monitor\.csv' is not a file of QuantMonitor.*'a,b'.*Move it away"):
        file.begin(0)
    assert file.path.read_text() == "a,b\n1,2\n"


def test_a_file_that_cannot_be_written_does_not_end_the_training(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class Breaking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 1:
                (tmp_path / FILE_NAME).unlink()
                (tmp_path / FILE_NAME).mkdir()
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(callbacks=[QuantRetrainCallback(), QuantMonitor(every_n_steps=4, verbose=False)])
    with pytest.warns(UserWarning, match=r"could not write step 4 to .*quant_monitor\.csv"):
        trainer.fit(Breaking(), loader())
    assert trainer.global_step == 8


def test_a_new_run_in_the_same_folder_begins_a_new_file(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    for every in (1, 4):
        callbacks = [QuantRetrainCallback(), QuantMonitor(every_n_steps=every, verbose=False)]
        make_trainer(callbacks=callbacks, max_epochs=1).fit(Net(), loader())
    assert _steps(MonitorFile(tmp_path / FILE_NAME)) == ["4", "4"]


def test_no_file_is_written_without_csv(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), QuantMonitor(every_n_steps=1, csv=False, verbose=False)]
    make_trainer(callbacks=callbacks, max_epochs=1).fit(Net(), loader())
    assert not (tmp_path / FILE_NAME).exists()
