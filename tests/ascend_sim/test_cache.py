"""The cache of the equipment: built once, by one process, never half."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ascend_sim.cache import cached


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path))
    return tmp_path


def _make_slowly(folder: Path) -> None:
    (folder / "first").touch()
    time.sleep(0.5)
    (folder / "maker").write_text(str(os.getpid()))


def _make_forever(folder: Path) -> None:
    (folder / "first").touch()
    time.sleep(60)


def _start(make: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=cached, args=("thing", make))
    process.start()
    return process


def test_two_processes_make_it_once(cache: Path) -> None:
    processes = [_start(_make_slowly), _start(_make_slowly)]
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert (cache / "thing" / "maker").read_text() in [str(process.pid) for process in processes]
    assert not list(cache.glob("*.part-*"))


def test_what_a_killed_process_left_is_made_again(cache: Path) -> None:
    process = _start(_make_forever)
    while not list(cache.glob("*.part-*/first")):
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    assert not (cache / "thing").exists()
    assert sorted(path.name for path in cached("thing", _make_slowly).iterdir()) == ["first", "maker"]
    assert not list(cache.glob("*.part-*"))


def test_a_failure_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "first").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("thing", fail)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_git_ignores_the_cache(cache: Path) -> None:
    cached("thing", _make_slowly)

    assert (cache / ".gitignore").read_text() == "*\n"
