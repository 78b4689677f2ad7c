"""Everything that a report shows, read from the folder of a run or from one checkpoint."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from amct_lightning.conversion.report_rows import ReportRow
from amct_lightning.monitor_format import COLUMNS, FILE_NAME, PHASE_METRIC, PREFIX, LayerReading
from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.run_report.checkpoint import CheckpointFacts, read_facts, scales_of_record
from amct_lightning.run_report.folder import choose_log_folders, find_files, find_log_folders, same_runs
from amct_lightning.run_report.logs import (
    EVENT_FILES,
    METRICS_FILE,
    Columns,
    Monitor,
    Series,
    all_steps,
    finite,
    join,
    join_monitors,
    read_log_folder,
    read_monitor,
)

T = TypeVar("T")
_TRIES = 5
_LATER_FILES = FILE_NAME.replace(".", "-*.")
"""What QuantMonitor writes where there is a file of another run."""


@dataclass
class Run:
    """What was found of a run.

    Attributes:
        source: What the user named.
        metrics: What the Trainer logged, and ``epoch``.
        monitor: What QuantMonitor wrote, by layer.
        checkpoint: The newest usable checkpoint.
        record: The record, by layer.
        record_source: Where it comes from, for people.
        files: All files that were used.
        notes: What the reader has to know about files that were left out or not complete.
    """

    source: Path
    metrics: Columns = field(default_factory=dict)
    monitor: Monitor = field(default_factory=dict)
    checkpoint: CheckpointFacts | None = None
    record: Mapping[str, LayerRecord] = field(default_factory=dict)
    record_source: str = ""
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def logged(self) -> Columns:
        """The metrics that the user's module logged."""
        own = ("epoch", PHASE_METRIC)
        return {name: s for name, s in self.metrics.items() if name not in own and not name.startswith(PREFIX)}

    @property
    def readings(self) -> list[LayerReading]:
        """What QuantMonitor saw last of each layer."""
        last = {
            layer: {name: next(reversed(series.values())) for name, series in columns.items() if name in COLUMNS}
            for layer, columns in self.monitor.items()
        }
        return [
            LayerReading(layer, **{n: v for n, v in values.items() if n != "epoch"}) for layer, values in last.items()
        ]

    @property
    def phases(self) -> Series:
        """The phase of the quantization over the steps, as far as it was logged."""
        return finite(self.metrics.get(PHASE_METRIC, {}))

    @cached_property  # read only when all has been found, then with every axis
    def steps(self) -> int:
        """The number of training steps, at least 1: the metrics count them from 0, QuantMonitor how many are done."""
        logged, watched = all_steps([self.metrics]), all_steps(self.monitor.values())
        return max([1, *(step + 1 for step in logged[-1:]), *watched[-1:]])

    @property
    def rows(self) -> tuple[ReportRow, ...]:
        """The conversion table, empty without a checkpoint."""
        return self.checkpoint.rows if self.checkpoint else ()

    @property
    def scales(self) -> dict[str, list[float]]:
        """The weight scales by layer: of the checkpoint, else of the record."""
        return (self.checkpoint.scales if self.checkpoint else {}) or scales_of_record(self.record)

    @property
    def changed(self) -> datetime | None:
        """When the newest of the files was changed."""
        times = [path.stat().st_mtime for path in self.files if path.exists()]
        return datetime.fromtimestamp(int(max(times)), timezone.utc) if times else None

    def relative(self, path: Path) -> str:
        """Name a file as seen from the source."""
        return os.path.relpath(path, self.source) if self.source.is_dir() else path.name


def load_run(source: str | Path) -> Run:
    """Read what there is of a run.

    Args:
        source: The folder of a run, searched with all folders below, or one checkpoint.

    Returns:
        The run.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder holds nothing of a quantized run.
        OSError: If a checkpoint cannot be read.
        RuntimeError: If ``source`` is a file, but no checkpoint.
        ValueError: If ``source`` is a checkpoint that was written without QuantRetrainCallback.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder '{path}'. Give the folder of a run, or a .ckpt file.")
    run = Run(path)
    if path.is_dir() and path.suffix != ".ckpt":  # a sharded checkpoint is a folder as well
        _take_folder(run, path)
    else:
        _take_checkpoint(run, path, read_facts(path, run.notes))
    inside = f"{path}{os.sep}"
    run.notes = list(dict.fromkeys(note.replace(inside, "") for note in run.notes))
    return run


def _take_folder(run: Run, folder: Path) -> None:
    logs, others = _take_metrics(run, find_log_folders(folder))
    logs += _take_monitor(run, find_files(folder, FILE_NAME, _LATER_FILES), logs, others)
    checkpoint = _first_usable(run, _near(logs, find_files(folder, "*.ckpt")), lambda path: read_facts(path, run.notes))
    if checkpoint:
        _take_checkpoint(run, *checkpoint)
    if not run.record:
        record = _first_usable(run, _near(logs, find_files(folder, "*.record.txt", "record.txt")), QuantRecord.load)
        if record:
            run.record_source, run.record = os.fspath(record[0]), record[1]
            run.files.append(record[0])
    if not (run.metrics or run.monitor or run.checkpoint or run.record):
        said = "".join(f"\n{note}" for note in run.notes)
        raise FileNotFoundError(
            f"'{folder}' holds nothing to report. Looked for, in it and below: {METRICS_FILE} (of CSVLogger), "
            f"{EVENT_FILES} (of TensorBoardLogger), {FILE_NAME} (of QuantMonitor), *.ckpt (of a training with "
            "QuantRetrainCallback), record.txt and *.record.txt. Give the folder that the Trainer wrote to "
            f"(default_root_dir, the logger's save_dir).{said}"
        )


def _take_metrics(run: Run, places: list[Path]) -> tuple[list[Path], set[Path]]:
    """Read the metrics of the newest run; return all of its log folders, and those of other runs."""
    notes: dict[Path, list[str]] = defaultdict(list)
    metrics = {place: read_log_folder(place, notes[place]) for place in places}
    folders = same_runs(metrics)
    chosen = choose_log_folders([*folders], lambda place: all_steps([metrics[place]]), run.notes)
    run.metrics = join(metrics[place] for place in chosen)
    run.notes += [note for place in chosen for note in notes[place]]
    run.files += [path for place in chosen for path in sorted(place.iterdir()) if _is_log(path)]
    own = [place for first in chosen for place in folders[first]]
    unread = {place for place in places if not metrics[place] and not (place / METRICS_FILE).exists()}
    return own, set(places) - set(own) - unread


def _is_log(path: Path) -> bool:
    if (path.parent / METRICS_FILE).exists():
        return path.name == METRICS_FILE
    return path.match(EVENT_FILES)


def _take_monitor(run: Run, paths: list[Path], log_folders: list[Path], others: set[Path]) -> list[Path]:
    """Read what QuantMonitor wrote beside the metrics; else where no other run's metrics are. Return where that is.

    With several loggers QuantMonitor writes to the folder of the first one, without a logger to that of the run. Where
    several runs share a folder, the newest file counts.
    """
    near = [path for path in paths if path.parent in log_folders]
    near = near or [path for path in paths if path.parent not in others]
    newest: dict[Path, Path] = {}
    for path in near:
        if newest.setdefault(path.parent, path) is not path:
            run.notes.append(f"{path}: left out, it is of another run than {newest[path.parent].name} or older.")
    monitors = {place: read_monitor(path, run.notes) for place, path in newest.items()}
    chosen = [place for place in log_folders if place in monitors]
    chosen = chosen or choose_log_folders([*monitors], lambda at: all_steps(monitors[at].values()), run.notes)
    run.monitor = join_monitors([monitors[place] for place in chosen])
    run.files += [newest[place] for place in chosen]
    return chosen


def _near(log_folders: list[Path], paths: list[Path]) -> list[Path]:
    """Prefer files that lie in the log folders: Lightning's default place for checkpoints."""
    inside = [path for path in paths if any(folder in path.parents for folder in log_folders)]
    return inside or paths


def _first_usable(run: Run, paths: list[Path], read: Callable[[Path], T]) -> tuple[Path, T] | None:
    for path in paths[:_TRIES]:
        try:
            return path, read(path)
        except (OSError, RuntimeError, ValueError) as error:
            run.notes.append(str(error))
    return None


def _take_checkpoint(run: Run, path: Path, facts: CheckpointFacts) -> None:
    run.checkpoint = facts
    run.files.append(path)
    if facts.record is not None:
        run.record, run.record_source = facts.record, f"the checkpoint {path.name}"
