"""Putting a file in its place in one step; what is no ordinary file is written to and never replaced."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_OWN = 100
"""Bytes of a name that go into that of its temporary file, beside a digest: file systems allow 255 for both."""

_DAY = 24 * 3600


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Give a temporary path beside ``final``; move it to ``final`` when the block ends without an error.

    What ``final`` is now stays until then, and if the block fails. Into a terminal, a pipe or another device the
    content of the temporary file is written instead, because replacing it would take it from everybody else.

    Args:
        final: The file, with its folder.

    Yields:
        A path to be written by the caller.

    Raises:
        OSError: If it cannot be written, or is a socket or a disk.
    """
    if is_special(final):
        with _written_into(final) as temporary:
            yield temporary
        return
    _remove_leftovers(final)
    temporary = final.with_name(f"{_prefix(final)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Not by tempfile, whose files are private: the system itself applies the umask, or the folder's ACL, to this one.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE((final if final.exists() else temporary).stat().st_mode)
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)  # the caller may have put a file of its own in its place
        temporary.replace(final)
        _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Tell whether there is something that is neither a file nor a folder: a device, a pipe, a socket.

    Args:
        path: The path.

    Raises:
        OSError: If it is one that no text can be written to.

    Example:
        >>> is_special(Path("/dev/null")), is_special(Path("/"))
        (True, False)
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return False
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return True
    kind = "a socket" if stat.S_ISSOCK(mode) else "a device that holds blocks, such as a disk"
    raise OSError(f"'{path}' is {kind}, to which nothing is written. Give the path of a file.")


@contextmanager
def _written_into(device: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        temporary.touch()
        yield temporary
        try:
            # Without waiting: a pipe that nobody reads would stop the program for good.
            descriptor = os.open(device, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise OSError(f"'{device}' cannot be written: {error.strerror}. Give the path of a file.") from error
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(temporary.read_bytes())


def _prefix(final: Path) -> str:
    """Return what the names of temporary files for a target begin with, short enough for any file system."""
    name = final.name
    if len(os.fsencode(name)) > _LONGEST_OWN:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[:_LONGEST_OWN].decode(errors='ignore')}-{digest}"
    return f".{name}.{_place()}-"


def _place() -> str:
    """Return where process numbers mean what they mean here: this machine, and this container on it."""
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:64]
    with suppress(OSError):
        return f"{host}_{re.sub('[^0-9]', '', str(Path('/proc/self/ns/pid').readlink()))}"
    return host


def _remove_leftovers(final: Path) -> None:
    """Remove temporary files that a killed process has left for the same target.

    Whether one of another container still runs cannot be told from here; its files go when they are a day old.
    """
    own = _prefix(final)
    everybody = own[: -len(_place()) - 1]
    for leftover in final.parent.glob(f"{glob.escape(everybody)}*.tmp"):
        pid = leftover.name.removeprefix(own).split("-")[0]
        can_ask = leftover.name.startswith(own) and pid.isdigit()
        if (can_ask and not _is_alive(int(pid))) or (not can_ask and _age(leftover) > _DAY):
            leftover.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


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
