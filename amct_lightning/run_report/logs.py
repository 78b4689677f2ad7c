"""Reading the two CSV files of a run, ``metrics.csv`` and ``quant_monitor.csv``, and joining those of resumed runs."""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MONITOR_COLUMNS = (
    "clip_max",
    "clip_min",
    "scale",
    "offset",
    "saturation_low",
    "saturation_high",
    "utilisation",
    "sqnr_input_db",
    "sqnr_weight_db",
    "weight_scale_mean",
    "clip_drift",
    "weight_scale_drift",
)
"""The columns of ``quant_monitor.csv`` that hold numbers of a layer."""

Row = dict[str, str]
_LARGEST_STEP = 2**53


@dataclass(frozen=True)
class Series:
    """The values of one quantity over the training steps, in ascending order of the steps.

    Attributes:
        steps: The steps.
        values: A value for each of them, NaN and infinity as they were logged.

    Example:
        >>> Series((0, 10, 20), (3.0, math.nan, 1.0)).finite()
        Series(steps=(0, 20), values=(3.0, 1.0))
    """

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Return the points that can be drawn."""
        return _series([(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)])

    def until(self, step: int) -> Series:
        """Return the points before ``step``."""
        end = bisect_left(self.steps, step)
        return Series(self.steps[:end], self.values[:end])

    def since(self, step: int) -> Series:
        """Return the points from ``step`` on."""
        start = bisect_left(self.steps, step)
        return Series(self.steps[start:], self.values[start:])

    def then(self, later: Series) -> Series:
        """Return this series up to the first step of ``later``, and ``later`` from there on.

        Example:
            >>> Series((0, 10, 20), (3.0, 2.0, 1.0)).then(Series((10, 30), (7.0, 8.0)))
            Series(steps=(0, 10, 30), values=(3.0, 7.0, 8.0))
        """
        kept = self.until(later.steps[0]) if later.steps else self
        return Series(kept.steps + later.steps, kept.values + later.values)


@dataclass(frozen=True)
class Metrics:
    """What a ``metrics.csv`` holds.

    Attributes:
        series: The metrics by name, in the order of the columns.
        epochs: Number of epochs begun, 0 if the file does not tell.
    """

    series: dict[str, Series] = field(default_factory=dict)
    epochs: int = 0

    @property
    def steps(self) -> tuple[int, ...]:
        """All steps at which something was logged, ascending."""
        return _steps(self.series.values())


Monitor = dict[str, dict[str, Series]]
"""What a ``quant_monitor.csv`` holds: by layer, in the order of first appearance, the columns."""


def read_metrics(path: Path, notes: list[str]) -> Metrics:
    r"""Read the file of Lightning's CSVLogger.

    Args:
        path: The file.
        notes: Takes what the reader of the report has to know, such as lines that were left out.

    Returns:
        The metrics; without any if the file is empty.

    Raises:
        OSError: If it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("epoch,step,loss,val_acc\n0,9,2.5,\n0,9,,0.4\n")
        >>> read_metrics(path, []).series["val_acc"]
        Series(steps=(9,), values=(0.4,))
    """
    points: dict[str, list[tuple[int, float]]] = {}
    epochs = 0
    for step, row in _rows(path, notes):
        epoch = _number(row.pop("epoch", ""))
        if epoch is not None and math.isfinite(epoch):
            epochs = max(epochs, int(epoch) + 1)
        for name, text in row.items():
            value = _number(text)
            if value is not None:
                points.setdefault(name, []).append((step, value))
    return Metrics({name: _series(found) for name, found in points.items()}, epochs)


def read_monitor(path: Path, notes: list[str]) -> Monitor:
    """Read the file of QuantMonitor; where its steps go back, a resumed run has gone on in the same file.

    Args:
        path: The file.
        notes: Takes what the reader of the report has to know.

    Returns:
        The columns by layer; empty if the file is.

    Raises:
        OSError: If it cannot be read.
    """
    rows: dict[str, list[tuple[int, Row]]] = {}
    for step, row in _rows(path, notes):
        if row.get("layer"):
            rows.setdefault(row["layer"], []).append((step, row))
    monitor: Monitor = {}
    for layer, found in rows.items():
        attempts = [{name: _column(part, name) for name in MONITOR_COLUMNS} for part in _attempts(found)]
        monitor[layer] = _joined(attempts)
    return monitor


def all_steps(monitor: Monitor) -> tuple[int, ...]:
    """Return all steps at which some layer was looked at, ascending."""
    return _steps(series for columns in monitor.values() for series in columns.values())


def join_metrics(attempts: Sequence[Metrics]) -> Metrics:
    """Join the metrics of a run that was resumed; where two overlap, the later one counts.

    Args:
        attempts: The metrics of the run and its resumptions, in this order.

    Returns:
        The metrics of all of it.
    """
    series = _joined([attempt.series for attempt in attempts])
    return Metrics(series, max((attempt.epochs for attempt in attempts), default=0))


def join_monitors(attempts: Sequence[Monitor]) -> Monitor:
    """Join what QuantMonitor saw of a run that was resumed; where two overlap, the later one counts.

    Args:
        attempts: The columns by layer of the run and its resumptions, in this order.

    Returns:
        The columns of all of it.
    """
    layers = dict.fromkeys(layer for attempt in attempts for layer in attempt)
    return {layer: _joined([attempt[layer] for attempt in attempts if layer in attempt]) for layer in layers}


def _steps(found: Iterable[Series]) -> tuple[int, ...]:
    return tuple(sorted({step for series in found for step in series.steps}))


def _joined(attempts: Iterable[dict[str, Series]]) -> dict[str, Series]:
    joined: dict[str, Series] = {}
    for attempt in attempts:
        for name, series in attempt.items():
            joined[name] = joined.get(name, Series()).then(series)
    return joined


def _attempts(rows: Iterable[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    """Split the rows of a layer where the steps go back."""
    attempts: list[list[tuple[int, Row]]] = []
    before = -1
    for step, row in rows:
        if step < before or not attempts:
            attempts.append([])
        attempts[-1].append((step, row))
        before = step
    return attempts


def _column(rows: list[tuple[int, Row]], name: str) -> Series:
    numbers = [(step, _number(row.get(name, ""))) for step, row in rows]
    return _series([(step, value) for step, value in numbers if value is not None])


def _series(points: Iterable[tuple[int, float]]) -> Series:
    """Sort points by step; of several at one step the last one counts."""
    by_step = sorted(dict(points).items())
    return Series(tuple(step for step, _ in by_step), tuple(value for _, value in by_step))


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[int, Row]]:
    """Yield the lines that have a step; others are counted in a note."""
    reader = csv.DictReader(io.StringIO(_complete_lines(path, notes), newline=""))
    unreadable = 0
    try:
        for row in reader:
            step = _number(row.pop("step", None))
            if step is None or not 0 <= step < _LARGEST_STEP:
                unreadable += 1
                continue
            yield int(step), {name: text or "" for name, text in row.items() if name}  # None: fields beyond the header
    except csv.Error as error:
        notes.append(f"{path}: read up to line {reader.line_num} only; what follows is no CSV ({error}).")
    if unreadable:
        notes.append(f"{path}: {unreadable} line{'s' if unreadable > 1 else ''} without a step left out.")


def _complete_lines(path: Path, notes: list[str]) -> str:
    """Return the text of a file without a last line that a killed process has left unfinished."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\0", "")
    if text and not text.endswith("\n"):
        notes.append(f"{path}: the last line is incomplete (the run was stopped while writing it) and left out.")
        text = text[: text.rfind("\n") + 1]
    return text


def _number(text: str | None) -> float | None:
    """Return the number in a cell, ``None`` if there is none."""
    try:
        return float(text) if text else None
    except ValueError:
        return None
