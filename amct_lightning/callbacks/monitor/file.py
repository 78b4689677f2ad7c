"""The file ``quant_monitor.csv``: what a monitor found, one line per layer and interval."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from amct_lightning.files import check_writable, write_text
from amct_lightning.monitor_format import COLUMNS, LayerReading


class MonitorFile:
    """Appends to a CSV file so that every line in it is complete.

    The lines of an interval are added in one write. A kill can leave no more than an incomplete last line, which the
    next run drops.

    Args:
        path: The file.

    Example:
        >>> import tempfile
        >>> file = MonitorFile(Path(tempfile.mkdtemp()) / "quant_monitor.csv")
        >>> file.begin(step=0)
        >>> file.append(50, 0, [LayerReading("conv", clip_max=2.5)])
        >>> file.path.read_text().splitlines()[1]
        '50,0,conv,2.5,,,,,,,,,,,'
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Make the file, or keep what an earlier run has written up to a step and drop the rest.

        Args:
            step: The step that the training begins at.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the file is not one of a monitor.
        """
        check_writable(self.path, "monitor file")
        old = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        new = _line(COLUMNS)
        if old:
            if not old.startswith(new):
                raise ValueError(
                    f"'{self.path}' is not a file of QuantMonitor: its first line is {old.splitlines()[0][:80]!r}, not "
                    f"{new.strip()!r}. Move it away, or choose another log directory."
                )
            new += "".join(line for line in old[len(new) :].splitlines(keepends=True) if _is_kept(line, step))
        if new != old:
            write_text(self.path, new)

    def append(self, step: int, epoch: int, readings: Iterable[LayerReading]) -> None:
        """Add the lines of an interval.

        Args:
            step: The Trainer's ``global_step`` at its end.
            epoch: The epoch.
            readings: What was found.

        Raises:
            OSError: If the file cannot be written; it is then as before.
        """
        data = "".join(_line((step, epoch, *map(_cell, astuple(reading)))) for reading in readings).encode()
        with self.path.open("ab", buffering=0) as file:
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
