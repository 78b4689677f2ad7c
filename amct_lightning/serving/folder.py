"""A folder that appears whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amct_lightning.files import make_parent

DESCRIPTION = "quant_model_description.json"


def checked_folder(folder: str | Path) -> Path:
    """Return where the checkpoint will be, if nothing else is there.

    Args:
        folder: The folder; an earlier checkpoint in it is replaced.

    Raises:
        ValueError: If it is a file, or a folder that holds something else.
    """
    path = Path(os.path.realpath(Path(folder).expanduser()))
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{folder}' is a file; a checkpoint for servers is a folder. Give another name.")
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION).is_file():
        raise ValueError(
            f"'{folder}' holds other files and no {DESCRIPTION}: it is no earlier checkpoint for servers, which would "
            "be replaced. Give a new folder."
        )
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path``; it takes the place of that when the block ends without an error.

    Args:
        path: The final folder. What is there stays until the new one is complete and on the disk.

    Yields:
        A folder to be written by the caller.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "served"
        >>> with whole_folder(target) as folder:
        ...     _ = (folder / "a.txt").write_text("done")
        >>> [file.name for file in target.iterdir()]
        ['a.txt']
    """
    make_parent(path)
    token = secrets.token_hex(4)
    new, old = (path.with_name(f".{path.name[:200]}.{token}.{kind}") for kind in ("tmp", "old"))
    new.mkdir()
    try:
        yield new
        for place in (*new.iterdir(), new):
            _sync(place)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
