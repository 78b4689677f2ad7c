"""Where a run leaves its files: nothing in a local folder named after a scheme or the home folder's sign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from amct_lightning import QuantMonitor, QuantRecord, QuantRetrainCallback
from amct_lightning.commands.quant_cli import QuantCLI
from amct_lightning.monitor_format import COLUMNS, FILE_NAME
from tests.callbacks.conftest import Net, loader


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the process runs in, and a home folder beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


@pytest.fixture
def remote(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.name}"


def trainer_of(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**defaults, **quiet, **arguments}, callbacks=list(callbacks))


def remote_files(address: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def test_a_remote_root_takes_all_files(here: Path, remote: str) -> None:
    callbacks = [QuantRetrainCallback(), QuantMonitor(verbose=False), ModelCheckpoint(filename="{epoch}", save_top_k=1)]
    trainer = trainer_of(*callbacks, default_root_dir=remote)
    module = Net()
    trainer.fit(module, loader())
    files = remote_files(remote)
    assert list(here.iterdir()) == []
    assert files.keys() == {
        "record.txt",
        FILE_NAME,
        "checkpoints/epoch=1.ckpt",
        "checkpoints/epoch=1.record.txt",
    }
    assert QuantRecord.load(f"{remote}/record.txt") == QuantRecord.from_model(module)
    assert files["checkpoints/epoch=1.record.txt"] == files["record.txt"]
    lines = files[FILE_NAME].decode().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 9) for _ in range(2)]


def test_a_run_goes_on_from_a_remote_root(here: Path, remote: str) -> None:
    for epochs, start in ((1, None), (2, f"{remote}/checkpoints/last.ckpt")):
        callbacks = [QuantRetrainCallback(), QuantMonitor(verbose=False), ModelCheckpoint(save_last=True)]
        trainer_of(*callbacks, max_epochs=epochs, default_root_dir=remote).fit(Net(), loader(), ckpt_path=start)
    lines = remote_files(remote)[FILE_NAME].decode().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 9) for _ in range(2)]
    assert list(here.iterdir()) == []


def test_the_record_can_be_remote_alone(here: Path, remote: str) -> None:
    trainer_of(QuantRetrainCallback(record_file=f"{remote}/r.txt"), enable_checkpointing=False).fit(Net(), loader())
    assert remote_files(remote).keys() == {"r.txt"}
    assert list(here.iterdir()) == []


def test_the_home_folder_is_meant_by_its_sign(here: Path) -> None:
    trainer = trainer_of(QuantRetrainCallback(record_file="~/r.txt"), enable_checkpointing=False)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint("~/run/last.ckpt")
    assert list(here.iterdir()) == []
    home = here.parent / "home"
    assert {str(file.relative_to(home)) for file in home.rglob("*.*")} == {
        "r.txt",
        "run/last.ckpt",
        "run/last.record.txt",
    }
    trainer_of(QuantRetrainCallback(), max_epochs=3).fit(Net(), loader(), ckpt_path="~/run/last.ckpt")


def test_the_configuration_of_a_run_goes_to_a_remote_root(here: Path, remote: str) -> None:
    for epochs in (1, 2, 1):
        arguments = ["fit", f"--trainer.default_root_dir={remote}", f"--trainer.max_epochs={epochs}"]
        arguments += ["--trainer.logger=false", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
        QuantCLI(BoringModel, args=[*arguments, "--trainer.enable_checkpointing=false"])
    assert remote_files(remote).keys() == {"config.yaml", "config-1.yaml", "record.txt"}
    assert list(here.iterdir()) == []
