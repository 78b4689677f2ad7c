"""What is no ordinary file is never replaced, names may be long, and a failed record costs no checkpoint."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from amct_lightning import QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.cli import main
from amct_lightning.files import atomic_path, check_writable, write_text
from amct_lightning.files.atomic import replacing


def trained(folder: Path, record: Any, *callbacks: pl.Callback, epochs: int = 1, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=0,
        callbacks=[QuantRetrainCallback(record_file=record), *callbacks],
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(BoringModel())
    return trainer


def saving(folder: Path) -> pl.Callback:
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_is_written_to_and_stays(pipe: Path) -> None:
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    time.sleep(0.2)
    write_text(pipe, "scale")
    reader.join(10)
    assert read == [b"scale"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_without_a_reader_and_a_socket_are_refused(pipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"pipe' cannot be written: .*Give the path of a file"):
        write_text(pipe, "scale")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for attempt in (lambda path: write_text(path, "scale"), lambda path: check_writable(path, "record file")):
            with pytest.raises(OSError, match="is a socket, to which nothing is written"):
                attempt(tmp_path / "socket")
        assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_stays_a_device(device: str, tmp_path: Path) -> None:
    check_writable(device, "record file")
    if device == "/dev/null":
        write_text(device, "scale")
    else:
        with pytest.raises(OSError, match="No space left"):
            write_text(device, "scale")
    link = tmp_path / "link"
    link.symlink_to(device)
    if device == "/dev/null":
        write_text(link, "scale")
        assert link.is_symlink()
    assert stat.S_ISCHR(Path(device).stat().st_mode)


def test_records_and_results_may_go_to_devices(tmp_path: Path) -> None:
    trainer = trained(tmp_path, "/dev/null")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert main(["record", "extract", str(tmp_path / "a.ckpt"), "-o", "/dev/null", "--force"]) == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    command = [sys.executable, "-m", "amct_lightning", "record", "extract", str(tmp_path / "a.ckpt")]
    printed = subprocess.run([*command, "-o", "/dev/stdout", "--force"], capture_output=True, text=True, check=True)
    assert "scale_d" in printed.stdout


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127, "x" * 200 + ".txt"):
        write_text(tmp_path / name, "done")
        assert (tmp_path / name).read_text() == "done"
    assert sorted(len(os.fsencode(path.name)) for path in tmp_path.iterdir()) == [204, 254, 255]


def test_a_temporary_file_of_another_container_is_left_alone_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "record.txt"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "readlink", lambda _: Path("pid:[17]"))  # as in another PID namespace of this machine
        writing = replacing(final)
        other = writing.__enter__()
    other.rename(other.with_name(other.name.replace(f"-{os.getpid()}-", "-999999999-")))
    (other,) = tmp_path.iterdir()
    write_text(final, "ours")
    assert other.exists()
    os.utime(other, (time.time() - 2 * 24 * 3600,) * 2)
    write_text(final, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["record.txt"]


def test_a_record_file_is_where_it_was_when_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moves(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            (tmp_path / "elsewhere").mkdir()
            os.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    trained(tmp_path, "record.txt", Moves(), saving(tmp_path / "checkpoints"))
    assert "scale_d" in (tmp_path / "record.txt").read_text()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_record_that_cannot_be_written_costs_a_warning_and_no_checkpoint(tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                (tmp_path / "record.txt").unlink()
                (tmp_path / "record.txt").mkdir()

    with pytest.warns(UserWarning, match=r"record\.txt' could not be written: Is a directory.*'amct-lightning record"):
        trained(tmp_path, tmp_path / "record.txt", Breaks(), saving(tmp_path / "ck"), epochs=3)
    assert sorted(path.name for path in (tmp_path / "ck").glob("*.ckpt")) == [f"epoch={n}.ckpt" for n in range(3)]
    for path in (tmp_path / "ck").glob("*.ckpt"):
        entry = torch.load(path, weights_only=True)["amct_lightning"]
        assert path.with_name(path.stem + ".record.txt").read_text() == entry["record"]


def test_a_checkpoint_that_fails_leaves_the_record_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fills(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                monkeypatch.setattr(torch, "save", self.fail)

        def fail(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    last = pl.callbacks.ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path, tmp_path / "run.txt", Fills(), last, epochs=3)
    entry = torch.load(tmp_path / "last.ckpt", weights_only=True)["amct_lightning"]
    assert (tmp_path / "last.record.txt").read_text() == entry["record"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_pair_that_disagrees_is_told(tmp_path: Path) -> None:
    trained(tmp_path, tmp_path / "run.txt").save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "a.record.txt").write_text("of another state")
    with pytest.warns(UserWarning, match=r"a\.record\.txt' is not the record of .*a\.ckpt'.*record extract"):
        load_qat_checkpoint(BoringModel, tmp_path / "a.ckpt")
    with atomic_path(tmp_path / "a.record.txt") as temporary:
        temporary.write_text(torch.load(tmp_path / "a.ckpt", weights_only=True)["amct_lightning"]["record"])
