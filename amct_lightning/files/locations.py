"""Writing files whole, here or on a remote file system: a reader sees the old file or the new one, never a half."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from amct_lightning.files.atomic import is_special, replacing

Location = Path | str
"""Where a file is: a path on this machine, or as text the address of one on a remote file system (``s3://...``)."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)(::[A-Za-z0-9+.-]+)*://")
_BROKEN_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
_LOCAL = ("file", "local")


def location(path: str | Path) -> Location:
    """Return where a path leads: ``~`` is the home folder, and what has a scheme such as ``s3://`` is remote.

    Args:
        path: What the user gave.

    Returns:
        A path on this machine, or the address as text, which no ``Path`` can hold.

    Raises:
        ValueError: If the path is an address that a ``Path`` was made of, which drops one of its slashes.

    Example:
        >>> location("runs/record.txt"), location("s3://bucket/record.txt")
        (PosixPath('runs/record.txt'), 's3://bucket/record.txt')
    """
    text = os.fspath(path)
    address = _ADDRESS.match(text)
    if address is not None and address["scheme"] not in _LOCAL:
        return text
    if address is not None:
        return Path(text[address.end() :]).expanduser()
    if _BROKEN_ADDRESS.match(text) and not Path(text.split("/")[0]).exists():
        scheme, _, rest = text.partition(":/")
        raise ValueError(
            f"'{text}' would be a file in a local folder named '{scheme}:'. For a remote place give it as text, "
            f"'{scheme}://{rest}', for a Path drops one of the slashes; for that folder, make it first."
        )
    return Path(text).expanduser()


def beside(folder: str | Path, name: str) -> Location:
    """Return where a file in a folder is, which may be a remote one.

    Example:
        >>> beside("s3://bucket/run/", "record.txt")
        's3://bucket/run/record.txt'
    """
    place = location(folder)
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def numbered(path: Location) -> Iterator[Location]:
    """Yield a path and other names for it, for files that must not replace those of another run.

    Args:
        path: The path.

    Example:
        >>> from itertools import islice
        >>> [str(name) for name in islice(numbered(Path("run/config.yaml")), 3)]
        ['run/config.yaml', 'run/config-1.yaml', 'run/config-2.yaml']
    """
    yield path
    for number in count(1):
        if isinstance(path, Path):
            yield path.with_stem(f"{path.stem}-{number}")
        else:
            folder, _, name = path.rpartition("/")
            stem, dot, suffix = name.rpartition(".")
            yield f"{folder}/{stem}-{number}{dot}{suffix}"


def make_parent(path: Path) -> None:
    """Create the missing folders above ``path``, with the permissions that the umask leaves.

    Args:
        path: The file that is to be written.

    Raises:
        OSError: If a folder cannot be created.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it to ``path`` when the block ends without an error.

    The temporary file is flushed to disk before the rename and the folder after it, so that neither a kill nor
    a power cut leaves a truncated file under the final name. On an error the temporary file is removed and the
    old file stays. An existing file keeps its permissions; a new one gets those that the umask leaves. Devices and
    pipes are written to, see :func:`amct_lightning.files.atomic.replacing`.

    Args:
        path: The final file on this machine; of a symbolic link, what it points to. Missing folders are created.

    Yields:
        A path in the same folder, to be written by the caller.

    Raises:
        ValueError: If the path is that of a remote file.

    Example:
        >>> import pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "record.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("done")
        >>> target.read_text()
        'done'
    """
    place = location(path)
    if isinstance(place, str):
        raise ValueError(f"'{place}' is on a remote file system, where no temporary file can be moved into its place.")
    # A device is taken as it was named: /dev/stdout leads to a pipe that has no path.
    final = place if is_special(place) else Path(os.path.realpath(place))
    make_parent(final)
    with replacing(final) as temporary:
        yield temporary


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that there is the old or the new content, never half of it.

    A remote file is written through fsspec in one transaction, as Lightning writes checkpoints. How whole that is
    lies with the file system: object stores show a file when all of it is there.

    Args:
        path: The file to create or replace, see :func:`location`. Missing folders are created.
        content: The complete content.

    Raises:
        OSError: If the folder cannot be created or written; the old file is then unchanged.
    """
    place = location(path)
    if isinstance(place, Path):
        with atomic_path(place) as temporary:
            temporary.write_bytes(content)
        return
    system, inner = _remote(place)
    system.makedirs(inner.rpartition("/")[0], exist_ok=True)
    with system.transaction, system.open(inner, "wb") as file:
        file.write(content)


def read_bytes(path: str | Path) -> bytes | None:
    """Return the content of a file, ``None`` if there is none.

    Args:
        path: The file, see :func:`location`.

    Raises:
        OSError: If it cannot be read.
    """
    place = location(path)
    try:
        if isinstance(place, Path):
            return place.read_bytes()
        system, inner = _remote(place)
        content: bytes = system.cat_file(inner)
        return content
    except FileNotFoundError:
        return None


def is_file(path: str | Path) -> bool:
    """Tell whether there is such a file; for the path see :func:`location`."""
    place = location(path)
    if isinstance(place, Path):
        return place.is_file()
    system, inner = _remote(place)
    return bool(system.isfile(inner))


def remove(path: str | Path) -> None:
    """Remove a file if there is one; for the path see :func:`location`."""
    place = location(path)
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    system, inner = _remote(place)
    if system.isfile(inner):
        system.rm_file(inner)


def check_writable(path: str | Path, what: str) -> None:
    """Make sure, before any work, that ``path`` can be written, without touching an existing file.

    Of a remote path it is only made sure that its file system is known and installed, and that it is no folder.

    Args:
        path: The file that will be written later, see :func:`location`.
        what: What the file is, for the message, for example ``"record file"``.

    Raises:
        IsADirectoryError: If ``path`` is a folder.
        OSError: If the folder cannot be created or a file cannot be made in it.
        ImportError: If what reads and writes the remote file system is not installed.
        ValueError: If the path is an address of an unknown kind.
    """
    final = location(path)
    try:
        is_folder = final.is_dir() if isinstance(final, Path) else _is_remote_folder(final)
    except (ImportError, ValueError) as error:
        raise type(error)(f"The {what} '{final}' cannot be written: {error}.") from error
    if is_folder:
        raise IsADirectoryError(
            f"The {what} '{final}' is a folder; give the path of a file, e.g. '{beside(final, 'record.txt')}'."
        )
    if isinstance(final, str):
        return
    try:
        if is_special(final):
            return
        make_parent(final)
        with tempfile.TemporaryFile(dir=final.parent):
            pass
    except OSError as error:
        raise type(error)(
            f"The {what} '{final}' cannot be written: {error.strerror or error}. "
            f"Choose a path in a folder that you may write to."
        ) from error


def _remote(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    from fsspec.core import url_to_fs  # noqa: PLC0415  (most runs need none)

    system, inner = url_to_fs(address)
    return system, str(inner)


def _is_remote_folder(address: str) -> bool:
    system, inner = _remote(address)
    return bool(system.isdir(inner)) and not system.isfile(inner)
