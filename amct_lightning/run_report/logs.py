"""Reading the logs of a run, of CSVLogger, TensorBoard and QuantMonitor, and joining those of resumed runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

METRICS_FILE = "metrics.csv"
EVENT_FILES = "events.out.tfevents.*"

Series = dict[int, float]
"""The values of one quantity by training step, in ascending order; NaN and infinity as they were logged."""
Columns = dict[str, Series]
"""Series by name, in the order in which they appeared."""
Monitor = dict[str, Columns]
"""What a ``quant_monitor.csv`` holds: by layer, in the order of first appearance, the columns."""

_LARGEST_STEP = 2**53
_PLACEHOLDER = "hp_metric"
"""What Lightning's TensorBoardLogger logs as -1 beside hyper parameters."""


def finite(series: Series) -> Series:
    """Return the points that can be drawn.

    Example:
        >>> finite({0: 3.0, 10: math.nan, 20: 1.0})
        {0: 3.0, 20: 1.0}
    """
    return {step: value for step, value in series.items() if math.isfinite(value)}


def all_steps(found: Iterable[Columns]) -> list[int]:
    """Return the steps at which there is anything, ascending."""
    return sorted({step for columns in found for series in columns.values() for step in series})


def join(attempts: Iterable[Columns]) -> Columns:
    """Join what was logged of a run that was resumed; where two overlap, the later one counts.

    Args:
        attempts: The columns of the run and its resumptions, in this order.

    Example:
        >>> join([{"loss": {0: 3.0, 10: 2.0, 20: 1.0}}, {"loss": {10: 7.0, 30: 8.0}}])
        {'loss': {0: 3.0, 10: 7.0, 30: 8.0}}
    """
    joined: Columns = {}
    for columns in attempts:
        for name, series in columns.items():
            for step, value in series.items():
                _add(joined.setdefault(name, {}), step, value)
    return joined


def join_monitors(attempts: list[Monitor]) -> Monitor:
    """Join what QuantMonitor saw of a run that was resumed, as :func:`join` does.

    Args:
        attempts: What it saw of the run and of its resumptions, in this order.
    """
    layers = dict.fromkeys(layer for attempt in attempts for layer in attempt)
    return {layer: join(attempt.get(layer, {}) for attempt in attempts) for layer in layers}


def read_metrics(path: Path, notes: list[str]) -> Columns:
    r"""Read the file of Lightning's CSVLogger.

    Args:
        path: The file.
        notes: Takes what the reader of the report has to know, such as lines that were left out.

    Returns:
        The metrics, and ``epoch``; empty if the file is, or cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("epoch,step,loss,val_acc\n0,9,2.5,\n0,9,,0.4\n")
        >>> read_metrics(path, [])
        {'epoch': {9: 0.0}, 'loss': {9: 2.5}, 'val_acc': {9: 0.4}}
    """
    columns: Columns = {}
    for step, row in _rows(path, notes):
        _add_row(columns, step, row)
    return columns


def read_log_folder(folder: Path, notes: list[str]) -> Columns:
    """Read the metrics that a logger left in a folder: ``metrics.csv``, else TensorBoard's event files.

    Args:
        folder: The folder.
        notes: Takes what the reader of the report has to know.

    Returns:
        The metrics, and ``epoch``.
    """
    path = folder / METRICS_FILE
    columns = read_metrics(path, notes) if path.exists() else {}
    return columns or (_read_events(folder, notes) if any(folder.glob(EVENT_FILES)) else {})


def _read_events(folder: Path, notes: list[str]) -> Columns:
    try:
        # Not among the requirements: who has such files usually has it.
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415
    except ImportError:
        notes.append(
            f"{folder}: TensorBoard's event files are not read, because tensorboard is not installed: "
            "pip install tensorboard."
        )
        return {}
    # Of scalars all, of what is not shown as little as there can be; a run that was resumed is cut by `_add`.
    few = {"tensors": 1, "distributions": 1, "histograms": 1, "images": 1, "audio": 1}
    events = EventAccumulator(str(folder), {"scalars": 0, **few}, purge_orphaned_data=False)
    columns: Columns = {}
    try:
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                _add(columns.setdefault(name, {}), int(event.step), float(event.value))
    except Exception as error:  # whatever a damaged file makes of its reader
        notes.append(f"{folder}: TensorBoard's event files are damaged ({type(error).__name__}: {error}).")
    if list(columns.get(_PLACEHOLDER, {}).values()) == [-1.0]:
        del columns[_PLACEHOLDER]
    return columns


def read_monitor(path: Path, notes: list[str]) -> Monitor:
    """Read the file of QuantMonitor.

    Args:
        path: The file.
        notes: Takes what the reader of the report has to know.

    Returns:
        The columns by layer; empty if the file is, or cannot be read.
    """
    monitor: Monitor = {}
    for step, row in _rows(path, notes):
        layer = row.pop("layer", "")
        if layer:
            _add_row(monitor.setdefault(layer, {}), step, row)
    return monitor


def _add_row(columns: Columns, step: int, row: dict[str, str]) -> None:
    for name, text in row.items():
        value = _number(text)
        if value is not None:
            _add(columns.setdefault(name, {}), step, value)


def _add(series: Series, step: int, value: float) -> None:
    """Add a point; where steps go back, a resumed run has gone on, and what came after that step no longer counts."""
    while series and next(reversed(series)) >= step:
        series.popitem()
    series[step] = value


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
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
    """Return the text of a file without a last line that a killed process has left unfinished; empty if unreadable."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\0", "")
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error.strerror or error}).")
        return ""
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
