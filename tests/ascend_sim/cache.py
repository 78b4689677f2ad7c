"""Folders that are made once and kept: complete or not there, also when two processes make them or one is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """`.cache/ascend_sim` of the repository (`ASCEND_SIM_CACHE` names another); git ignores what is in it."""
    folder = Path(os.environ.get("ASCEND_SIM_CACHE") or ROOT / ".cache" / "ascend_sim")
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    return folder


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `make` fills it if it is not there yet.

    It is filled under another name and renamed at the end. Whoever fills holds a lock, which ends with its process, so
    an unfinished folder found under the lock was left by a process that was killed.
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    with _locked(cache_folder() / f"{name}.lock"):
        if final.is_dir():
            return final
        for left_over in cache_folder().glob(f"{name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=cache_folder()))
        try:
            make(part)
            part.rename(final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return final


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
