"""Atomic file writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import glob
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE_MODE = 0o640
FOLDER_MODE = 0o750


def make_parent(path: Path) -> None:
    """Create the missing folders above ``path`` with mode 0750.

    Args:
        path: The file that is to be written.

    Raises:
        OSError: If a folder cannot be created.
    """
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


@contextmanager
def atomic_path(path: str | Path, mode: int | None = FILE_MODE) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it to ``path`` when the block ends without an error.

    The temporary file is flushed to disk before the rename and the folder after it, so that neither a kill nor
    a power cut leaves a truncated file under the final name. On an error the temporary file is removed and the
    old file stays.

    Args:
        path: The final file; of a symbolic link, what it points to. Missing folders are created.
        mode: Permissions of the file; ``None`` leaves them to the process's umask, as ``open`` does.

    Yields:
        A path in the same folder, to be written by the caller.

    Example:
        >>> import pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "record.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("done")
        >>> target.read_text()
        'done'
    """
    final = Path(os.path.realpath(path))
    make_parent(final)
    _remove_leftovers(final)
    prefix = f".{final.name}.{_host()}-{os.getpid()}-"
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=final.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(_umask_mode() if mode is None else mode)
        temporary.replace(final)
        _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically; new files get mode 0640, new folders 0750.

    Args:
        path: The file to create or replace.
        text: The complete content.

    Raises:
        OSError: If the folder cannot be created or written; the old file is then unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def check_writable(path: str | Path, what: str) -> None:
    """Make sure, before any work, that ``path`` can be written, without touching an existing file.

    Args:
        path: The file that will be written later.
        what: What the file is, for the message, for example ``"record file"``.

    Raises:
        IsADirectoryError: If ``path`` is a folder.
        OSError: If the folder cannot be created or a file cannot be made in it.
    """
    final = Path(path)
    if final.is_dir():
        raise IsADirectoryError(
            f"The {what} '{final}' is a folder; give the path of a file, e.g. '{final / 'record.txt'}'."
        )
    try:
        make_parent(final)
        with tempfile.TemporaryFile(dir=final.parent):
            pass
    except OSError as error:
        raise type(error)(
            f"The {what} '{final}' cannot be written: {error.strerror or error}. "
            f"Choose a path in a folder that you may write to."
        ) from error


def _remove_leftovers(final: Path) -> None:
    """Remove temporary files that a killed process of this machine has left for the same target."""
    prefix = f".{final.name}.{_host()}-"
    for leftover in final.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = leftover.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _umask_mode() -> int:
    umask = os.umask(0)  # the only way to read it
    os.umask(umask)
    return 0o666 & ~umask


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
