"""The file ``quant_monitor.csv``: what a monitor found, one line per layer and interval."""

from __future__ import annotations

import csv
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from amct_lightning.files import check_writable, is_file, location, numbered, read_bytes, write_bytes
from amct_lightning.monitor_format import COLUMNS, LayerReading


class MonitorFile:
    """Appends to a CSV file so that every line in it is complete, and never to that of another run.

    The lines of an interval are added in one write. A kill can leave no more than an incomplete last line, which the
    next run drops. A remote file cannot be appended to: it is written as a whole, when it has grown by an eighth.

    Args:
        path: The file. If there is one already that is not of this run, another name is taken: ``quant_monitor-1.csv``.

    Attributes:
        path: The file; its name is certain once there is a line in it.

    Example:
        >>> import tempfile
        >>> file = MonitorFile(Path(tempfile.mkdtemp()) / "quant_monitor.csv")
        >>> file.begin(step=0)
        >>> file.append(50, 0, [LayerReading("conv", clip_max=2.5)])
        >>> file.path.read_text().splitlines()[1]
        '50,0,conv,2.5,,,,,,,,,,,'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = location(path)
        self._is_made = False
        self._size, self._sum = 0, 0
        self._content = b""  # of a remote file
        self._sent = 0

    @property
    def mark(self) -> dict[str, int]:
        """By which the file is known again when the run goes on: size and check sum of what is written."""
        return {"size": self._size, "sum": self._sum}

    def begin(self, step: int, mark: Mapping[str, int] | None = None) -> None:
        """Look whether the file can be written; find the one that a run has written before it was stopped.

        Args:
            step: The step that the training begins at; lines of later steps are dropped.
            mark: The file's :attr:`mark` at that step, ``None`` for a new run.

        Raises:
            OSError: If the file cannot be written.
        """
        check_writable(self.path, "monitor file")
        if mark is None or not mark["size"]:
            return
        for path in numbered(self.path):
            content = read_bytes(path)
            if content is None:
                return
            begun, later = content[: mark["size"]], content[mark["size"] :].decode(errors="replace")
            if {"size": len(begun), "sum": zlib.crc32(begun)} != mark:
                continue
            begun += "".join(line for line in later.splitlines(keepends=True) if _is_kept(line, step)).encode()
            if begun != content:
                write_bytes(path, begun)
            self.path, self._is_made = path, True
            self._note(begun)
            self._sent = self._size
            return

    def append(self, step: int, epoch: int, readings: Iterable[LayerReading]) -> None:
        """Add the lines of an interval. If that fails, the file is as before, and a warning says so.

        Args:
            step: The Trainer's ``global_step`` at its end.
            epoch: The epoch.
            readings: What was found.
        """
        lines = [] if self._size else [_line(COLUMNS)]
        lines += [_line((step, epoch, *map(_cell, astuple(reading)))) for reading in readings]
        data = "".join(lines).encode()
        with self._no_reason_to_stop(f"step {step}"):
            if not self._is_made:
                self._make()
            if isinstance(self.path, Path):
                _append(self.path, data)
            self._note(data)
        if self._size - self._sent > self._sent // 8:
            self.flush()

    def flush(self) -> None:
        """Write what a remote file does not have yet. If that fails, a warning says so, and it is tried again later."""
        if isinstance(self.path, str) and self._sent < self._size:
            with self._no_reason_to_stop("its last lines"):
                write_bytes(self.path, self._content)
                self._sent = self._size

    @contextmanager
    def _no_reason_to_stop(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            rank_zero_warn(
                f"QuantMonitor could not write {what} to '{self.path}', which goes on without it: {error}. Make room "
                "on the disk, or use QuantMonitor(csv=False)."
            )

    def _make(self) -> None:
        """Take the first name that is free; of two runs that begin at once only one gets it."""
        for path in numbered(self.path):
            if isinstance(path, str):
                if is_file(path):
                    continue
            else:
                try:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                except FileExistsError:
                    continue
            self.path, self._is_made = path, True
            return

    def _note(self, data: bytes) -> None:
        self._size, self._sum = self._size + len(data), zlib.crc32(data, self._sum)
        if isinstance(self.path, str):
            self._content += data


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(f"no room for {len(data)} bytes")
        except OSError:
            file.truncate(size)
            raise


def _line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: str | float | None) -> str:
    """9 digits tell all float32 numbers apart; adding 0 makes -0 a plain 0."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value + 0.0:.9g}"


def _is_kept(line: str, step: int) -> bool:
    cells = next(csv.reader([line]), [])
    return line.endswith("\n") and len(cells) == len(COLUMNS) and cells[0].isdigit() and int(cells[0]) <= step
