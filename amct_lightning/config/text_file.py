"""Reading the text of a configuration file, whatever its format."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from amct_lightning.config.checks import found

MAX_BYTES = 64 << 20


def read_text(path: str | Path, remedy: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to do if there is no such file.

    Returns:
        Its text.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If there is no such file.
        OSError: If the file cannot be read.
        ValueError: If the content is no text, or more than a configuration can be.

    Example:
        >>> read_text("none.cfg", "check the path")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such config file; check the path: 'none.cfg'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"The config file must be given as a path, found {found(path)}.")
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so it is no configuration; check the path.")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"No such config file; {remedy}", str(path)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error}).") from error
