"""The file quant_monitor.csv: complete lines, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.file import MonitorFile
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.files import read_bytes
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
    marks = {}
    for step in (50, 100, 150):
        file.append(step, 0, READINGS)
        marks[step] = file.mark
    again = MonitorFile(file.path)
    again.begin(100, marks[100])
    assert _steps(again) == ["50", "50", "100", "100"]
    again.append(120, 0, READINGS)
    assert again.path == file.path
    assert _steps(file) == ["50", "50", "100", "100", "120", "120"]


def test_a_checkpoint_of_before_the_last_line_loses_none(file: MonitorFile) -> None:
    file.append(50, 0, READINGS)
    mark = file.mark
    file.append(100, 0, READINGS)
    MonitorFile(file.path).begin(100, mark)
    assert _steps(file) == ["50", "50", "100", "100"]


def test_no_half_line_is_kept_wherever_it_was_cut(file: MonitorFile) -> None:
    file.append(50, 0, READINGS)
    whole, mark = file.path.read_bytes(), file.mark
    file.append(100, 0, READINGS[:1])
    longer = file.path.read_bytes()
    for length in range(len(whole), len(longer)):
        file.path.write_bytes(longer[:length])
        again = MonitorFile(file.path)
        again.begin(200, mark)
        assert file.path.read_bytes() == whole
    again.append(100, 0, READINGS[:1])
    assert file.path.read_bytes() == longer


def test_a_file_that_is_as_it_should_be_is_left_alone(file: MonitorFile) -> None:
    file.append(50, 0, READINGS)
    before = file.path.stat().st_ino
    MonitorFile(file.path).begin(50, file.mark)
    assert file.path.stat().st_ino == before


def test_a_foreign_file_is_kept(file: MonitorFile) -> None:
    file.path.write_text("a,b\n1,2\n")
    other = MonitorFile(file.path)
    other.begin(100, file.mark)
    other.append(150, 0, READINGS)
    assert file.path.read_text() == "a,b\n1,2\n"
    assert other.path.name == "quant_monitor-1.csv"
    assert _steps(other) == ["150", "150"]


def test_two_runs_at_the_same_time_have_a_file_each(file: MonitorFile) -> None:
    other = MonitorFile(file.path)
    other.begin(0)
    for step in (50, 100):
        file.append(step, 0, READINGS[:1])
        other.append(2 * step, 0, READINGS[:1])
    assert other.path.name == "quant_monitor-1.csv"
    assert (_steps(file), _steps(other)) == (["50", "100"], ["100", "200"])


def test_a_remote_file_is_whole_after_flush(file: MonitorFile) -> None:
    far = MonitorFile("memory://of-test-file/quant_monitor.csv")
    for step in range(50, 5000, 50):
        file.append(step, 0, READINGS)
        far.append(step, 0, READINGS)
    far.flush()
    assert read_bytes(far.path) == file.path.read_bytes()
    again = MonitorFile("memory://of-test-file/quant_monitor.csv")
    again.begin(4950, far.mark)
    for one in (file, again):
        one.append(5000, 0, READINGS)
    again.flush()
    assert read_bytes(far.path) == file.path.read_bytes()


def test_a_file_that_cannot_be_written_does_not_end_the_training(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    class Breaking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 1:
                (tmp_path / FILE_NAME).unlink()
                (tmp_path / FILE_NAME).mkdir()
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(callbacks=[QuantRetrainCallback(), QuantMonitor(every_n_steps=1, verbose=False)])
    with pytest.warns(UserWarning, match=r"could not write step 2 to .*quant_monitor\.csv"):
        trainer.fit(Breaking(), loader())
    assert trainer.global_step == 8


class OneFolder(Logger):
    """Has one folder for all runs, as that of Weights & Biases."""

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return "7x2b"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("with_logger", [True, False])
@pytest.mark.parametrize("same_monitor", [True, False])
def test_a_new_run_in_the_same_folder_leaves_the_file_of_another(
    make_trainer: TrainerFactory, tmp_path: Path, with_logger: bool, same_monitor: bool
) -> None:
    logger = OneFolder(tmp_path) if with_logger else False
    monitor = QuantMonitor(every_n_steps=1, verbose=False)
    make_trainer(callbacks=[QuantRetrainCallback(), monitor], max_epochs=1, logger=logger).fit(Net(), loader())
    first = (tmp_path / FILE_NAME).read_bytes()
    other = monitor if same_monitor else QuantMonitor(every_n_steps=4, verbose=False)
    trainer = make_trainer(callbacks=[QuantRetrainCallback(), other], max_epochs=2, logger=logger)
    trainer.fit(Net(), loader())
    assert (tmp_path / FILE_NAME).read_bytes() == first
    steps = range(1, 9) if same_monitor else (4, 8)
    assert _steps(MonitorFile(tmp_path / "quant_monitor-1.csv")) == [str(step) for step in steps for _ in range(2)]


def test_a_second_fit_of_a_trainer_goes_on_in_its_file(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("of another run")
    module = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(), QuantMonitor(4, verbose=False)], max_epochs=1)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert _steps(MonitorFile(tmp_path / "quant_monitor-1.csv")) == ["4", "4", "8", "8", "12", "12"]
    assert not (tmp_path / "quant_monitor-2.csv").exists()


def test_a_run_that_goes_on_finds_its_own_file_among_others(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    for lines in (4, 2, 1):  # three runs: intervals of 1, 2 and 4 steps
        trainer = make_trainer(
            callbacks=[QuantRetrainCallback(), QuantMonitor(4 // lines, verbose=False)], max_epochs=1
        )
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / f"{lines}.ckpt")
    trainer = make_trainer(callbacks=[QuantRetrainCallback(), QuantMonitor(2, verbose=False)], max_epochs=2)
    trainer.fit(Net(), loader(), ckpt_path=tmp_path / "2.ckpt")
    names = sorted(file.name for file in tmp_path.glob("quant_monitor*"))
    assert names == ["quant_monitor-1.csv", "quant_monitor-2.csv", "quant_monitor.csv"]
    steps = {name: _steps(MonitorFile(tmp_path / name))[::2] for name in names}
    assert steps == {
        "quant_monitor.csv": ["1", "2", "3", "4"],
        "quant_monitor-1.csv": ["2", "4", "6", "8"],
        "quant_monitor-2.csv": ["4"],
    }


def test_no_file_is_written_without_csv(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), QuantMonitor(every_n_steps=1, csv=False, verbose=False)]
    make_trainer(callbacks=callbacks, max_epochs=1).fit(Net(), loader())
    assert not (tmp_path / FILE_NAME).exists()
