"""Atomic writing: what is left on disk, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from amct_lightning.files import (
    atomic_path,
    beside,
    check_writable,
    is_file,
    location,
    numbered,
    read_bytes,
    remove,
    write_text,
)


@contextmanager
def umask_of(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_text_and_the_permissions(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new" / "folder" / "record.txt"
    with umask_of(umask):
        write_text(path, "äöü")
    assert path.read_bytes() == "äöü".encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert {folder.stat().st_mode & 0o777 for folder in (path.parent, path.parent.parent)} == {0o777 & ~umask}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "record.txt"
    path.touch()
    path.chmod(mode)
    with umask_of(0o022):
        write_text(path, "new")
        assert path.stat().st_mode & 0o777 == mode
        with atomic_path(path) as temporary:  # as where the one who writes makes a file of his own
            temporary.unlink()
            temporary.write_text("newer")
    assert path.read_text() == "newer"
    assert path.stat().st_mode & 0o777 == mode


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


REMOTE = "memory://of-test-files/run"


def test_a_remote_file_is_written_read_and_removed() -> None:
    path = beside(REMOTE, "record.txt")
    assert read_bytes(path) is None
    check_writable(path, "record file")
    for text in ("first", "äöü"):
        write_text(path, text)
        assert read_bytes(path) == text.encode()
    assert is_file(path)
    with pytest.raises(IsADirectoryError, match=rf"The record file '{REMOTE}' is a folder"):
        check_writable(REMOTE, "record file")
    remove(path)
    remove(path)
    assert not is_file(path)


def test_an_error_while_a_remote_file_is_written_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    path = f"{REMOTE}/kept.txt"
    write_text(path, "old")

    def breaks(self: MemoryFile, content: bytes) -> int:
        raise OSError("the network is gone")

    monkeypatch.setattr(MemoryFile, "write", breaks)
    with pytest.raises(OSError, match="network"):
        write_text(path, "new")
    assert read_bytes(path) == b"old"


def test_the_home_folder_is_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_writable("~/runs/record.txt", "record file")
    write_text("~/runs/record.txt", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "runs" / "record.txt").read_text() == read_bytes("~/runs/record.txt").decode() == "text"


def test_an_address_of_a_local_file_is_its_path(tmp_path: Path) -> None:
    write_text(f"file://{tmp_path}/record.txt", "text")
    assert (tmp_path / "record.txt").read_text() == "text"


@pytest.mark.parametrize("address", ["s3://bucket/record.txt", "memory://bucket/record.txt"])
def test_a_path_that_was_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"give it as text, '{address}'"):
        write_text(Path(address), "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b.txt", "run::1.txt", "C:/record.txt", "x:y/record.txt"])
def test_a_colon_alone_makes_no_address(name: str) -> None:
    assert location(name) == Path(name)


def test_an_unknown_file_system_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"'nowhere://b/r\.txt' cannot be written: Protocol not known"):
        check_writable("nowhere://b/r.txt", "record file")


def test_other_names_for_a_file_keep_its_folder_and_ending() -> None:
    assert list(islice(numbered("s3://bucket/a.b/run.yaml"), 2)) == [
        "s3://bucket/a.b/run.yaml",
        "s3://bucket/a.b/run-1.yaml",
    ]
