"""Which of the files in a folder a report is made from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from amct_lightning.run_report.sources import load_run
from tests.run_report.conftest import report, write_metrics, write_monitor


def age(path: Path, minutes: int) -> None:
    """Let a file, or all files in a folder, be this old."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (1_700_000_000 - 60 * minutes,) * 2)


def test_a_resumed_run_is_joined_and_the_later_values_count(tmp_path: Path) -> None:
    write_metrics(tmp_path / "version_0", range(9, 200, 10), loss=lambda step: 1000 + step)
    write_metrics(tmp_path / "version_1", range(159, 300, 10), loss=lambda step: 2000 + step)
    loss = load_run(tmp_path).metrics["loss"]
    assert list(loss) == list(range(9, 300, 10))
    assert list(loss.values()) == [(1000 if step < 159 else 2000) + step for step in range(9, 300, 10)]


def test_runs_of_their_own_are_not_joined(tmp_path: Path) -> None:
    for version in range(3):
        write_metrics(tmp_path / f"version_{version}", range(9, 200, 10), loss=float(version))
    run = load_run(tmp_path)
    assert set(run.metrics["loss"].values()) == {2.0}
    assert any("version_0" in note and "version_1" in note for note in run.notes)


def test_a_resumption_that_follows_a_crash_finds_its_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "version_0", range(9, 400, 10), loss=0.0)
    write_metrics(tmp_path / "version_1", range(9, 200, 10), loss=1.0)
    (tmp_path / "version_2").mkdir()
    (tmp_path / "version_2" / "metrics.csv").touch()  # killed before anything was logged
    write_metrics(tmp_path / "version_3", range(109, 300, 10), loss=3.0)
    loss = load_run(tmp_path).metrics["loss"]
    assert list(loss) == list(range(9, 300, 10))
    assert set(loss.values()) == {1.0, 3.0}


def test_a_run_of_its_own_with_another_interval_is_not_joined(tmp_path: Path) -> None:
    write_metrics(tmp_path / "version_0", range(4, 200, 5), loss=0.0)
    write_metrics(tmp_path / "version_1", range(9, 200, 10), loss=1.0)
    assert set(load_run(tmp_path).metrics["loss"].values()) == {1.0}


def test_versions_are_ordered_as_numbers(tmp_path: Path) -> None:
    write_metrics(tmp_path / "version_9", range(9, 200, 10), loss=9.0)
    write_metrics(tmp_path / "version_10", range(159, 300, 10), loss=10.0)
    assert load_run(tmp_path).metrics["loss"][299] == 10.0


def test_a_test_run_does_not_hide_the_training_before(tmp_path: Path) -> None:
    write_metrics(tmp_path / "version_0", range(9, 200, 10), loss=0.5)
    write_metrics(tmp_path / "version_1", [0], test_acc=0.75)
    assert "loss" in load_run(tmp_path).metrics


def test_the_newest_of_several_experiments_is_shown(tmp_path: Path) -> None:
    for name, minutes in (("old", 60), ("new", 1), ("older", 90)):
        write_metrics(tmp_path / name / "version_0", range(9, 200, 10), **{name: 1.0})
        age(tmp_path / name, minutes)
    run = load_run(tmp_path)
    assert list(run.logged) == ["new"]
    assert any("old/version_0" in note for note in run.notes)


def test_monitor_of_another_logger_is_found(tmp_path: Path) -> None:
    write_metrics(tmp_path / "csv" / "version_0", range(9, 200, 10), loss=0.5)
    write_monitor(tmp_path / "tensorboard" / "version_0", [{"step": 10, "epoch": 0, "layer": "fc", "clip_max": 1}])
    run = load_run(tmp_path)
    assert list(run.monitor) == ["fc"]
    assert "loss" in run.metrics


def test_monitor_of_another_run_is_not_taken(tmp_path: Path) -> None:
    write_metrics(tmp_path / "a" / "version_0", range(9, 200, 10), loss=0.5)
    write_monitor(tmp_path / "a" / "version_0", [{"step": 10, "epoch": 0, "layer": "fc", "clip_max": 1}])
    age(tmp_path / "a", 60)
    write_metrics(tmp_path / "b" / "version_0", range(9, 200, 10), loss=0.5)
    assert load_run(tmp_path).monitor == {}


def test_monitor_that_goes_back_has_been_resumed(tmp_path: Path) -> None:
    steps = [10, 20, 30, 20, 30, 40]
    rows = [{"step": s, "epoch": 0, "layer": "fc", "clip_max": place} for place, s in enumerate(steps)]
    write_monitor(tmp_path, rows)
    assert load_run(tmp_path).monitor["fc"]["clip_max"] == {10: 0.0, 20: 3.0, 30: 4.0, 40: 5.0}


def test_newest_checkpoint_in_the_folder_of_the_logs_is_taken(real_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    newer = run / "elsewhere" / "newer.ckpt"
    newer.parent.mkdir()
    shutil.copy(next(run.rglob("last.ckpt")), newer)
    found = load_run(run)
    assert found.checkpoint is not None
    assert found.checkpoint.path.name == "last.ckpt"


def test_a_damaged_checkpoint_is_noted_and_an_older_one_taken(real_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    last = next(run.rglob("last.ckpt"))
    last.write_bytes(last.read_bytes()[:3000])
    page = report(run)
    assert page.facts["checkpoint"].startswith("epoch=3")
    assert "last.ckpt' cannot be read as a checkpoint" in page.sections[""]


def test_record_file_serves_where_there_is_no_checkpoint(real_run: Path, tmp_path: Path) -> None:
    shutil.copy(real_run / "record.txt", tmp_path / "record.txt")
    page = report(tmp_path)
    assert [row["layer"] for row in page.rows("The record")] == ["net.0", "net.4"]
    assert "Of the record" in page.sections["scales"]
    assert "in the checkpoints of a training with QuantRetrainCallback" in page.sections["conversion"]


@pytest.mark.parametrize(
    ("keep", "missing", "remedy"),
    [
        ("metrics.csv", "ranges", "add QuantMonitor()"),
        ("metrics.csv", "sqnr", "add QuantMonitor()"),
        ("metrics.csv", "scales", "ModelCheckpoint"),
        ("quant_monitor.csv", "curves", "use CSVLogger or TensorBoardLogger"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(
    real_run: Path, tmp_path: Path, keep: str, missing: str, remedy: str
) -> None:
    shutil.copy(next(real_run.rglob(keep)), tmp_path / keep)
    page = report(tmp_path)
    assert remedy in page.sections[missing]
    assert f"#{missing}" not in page.attributes("href")


def test_a_module_that_logs_nothing(tmp_path: Path) -> None:
    write_metrics(tmp_path, range(9, 100, 10), quant_phase=2)
    page = report(tmp_path)
    assert "call self.log in the LightningModule" in page.sections["curves"]
    assert page.facts["phase at the end"] == "learning"
