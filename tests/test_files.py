"""Atomic writing: what is left on disk, whatever happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from amct_lightning.files import atomic_path, check_writable, write_text


def test_the_text_and_the_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "record.txt"
    write_text(path, "äöü")
    assert path.read_bytes() == "äöü".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o750


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert [file.name for file in tmp_path.iterdir()] == ["record.txt"]
    assert path.read_text() == "old"


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "shared" / "record.txt", tmp_path / "record.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from amct_lightning.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path: path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "record.txt"
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_text(path, "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["record.txt"]


def test_the_file_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    with atomic_path(path) as temporary:
        write_text(path, "other")
        assert temporary.exists()
        temporary.write_text("ours")
    assert path.read_text() == "ours"


@pytest.mark.parametrize("place", ["folder", "under_a_file"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path if place == "folder" else tmp_path / "file" / "record.txt"
    with pytest.raises(OSError, match="record file"):
        check_writable(path, "record file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
