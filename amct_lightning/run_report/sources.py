"""Everything that a report shows, read from the folder of a run or from one checkpoint."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from amct_lightning.conversion.report import ReportRow
from amct_lightning.record import LayerRecord, QuantRecord
from amct_lightning.run_report.checkpoint import CheckpointFacts, read_facts
from amct_lightning.run_report.folder import METRICS_FILE, MONITOR_FILE, choose_log_folders, find_files
from amct_lightning.run_report.logs import (
    Metrics,
    Monitor,
    Series,
    all_steps,
    join_metrics,
    join_monitors,
    read_metrics,
    read_monitor,
)
from amct_lightning.run_report.scales import ScaleSummary, scales_of_record

PHASE_METRIC = "quant_phase"
_TRIES = 5


@dataclass
class Run:
    """What was found of a run.

    Attributes:
        source: What the user named.
        metrics: What the Trainer logged.
        monitor: What QuantMonitor wrote, by layer.
        checkpoint: The newest usable checkpoint.
        record: The record, by layer.
        record_source: Where it comes from, for people.
        files: All files that were used.
        notes: What the reader has to know about files that were left out or not complete.
    """

    source: Path
    metrics: Metrics = field(default_factory=Metrics)
    monitor: Monitor = field(default_factory=dict)
    checkpoint: CheckpointFacts | None = None
    record: Mapping[str, LayerRecord] = field(default_factory=dict)
    record_source: str = ""
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the source's path, for a title."""
        return self.source.resolve().name

    @property
    def last_step(self) -> int:
        """The last step of which anything is known; at least 1, so that an axis can end there."""
        return max([1, *self.metrics.steps[-1:], *all_steps(self.monitor)[-1:]])

    @property
    def steps(self) -> int:
        """The number of training steps: the metrics count them from 0, QuantMonitor how many are done."""
        return max([0, *(step + 1 for step in self.metrics.steps[-1:]), *all_steps(self.monitor)[-1:]])

    @property
    def rows(self) -> tuple[ReportRow, ...]:
        """The conversion table, empty without a checkpoint."""
        return self.checkpoint.rows if self.checkpoint else ()

    @property
    def phases(self) -> Series:
        """The phase of the quantization over the steps, as far as it was logged."""
        return self.metrics.series.get(PHASE_METRIC, Series()).finite()

    @property
    def scales(self) -> dict[str, ScaleSummary]:
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
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder '{path}'. Give the folder of a run, or a .ckpt file.")
    is_folder = path.is_dir() and path.suffix != ".ckpt"  # a sharded checkpoint is a folder as well
    run = _from_folder(path) if is_folder else _from_checkpoint(path)
    inside = f"{path}{os.sep}"
    run.notes = list(dict.fromkeys(note.replace(inside, "") for note in run.notes))
    return run


def _from_checkpoint(path: Path) -> Run:
    run = Run(path, files=[path])
    run.checkpoint = read_facts(path, run.notes)
    _take_record(run, run.checkpoint)
    return run


def _from_folder(folder: Path) -> Run:
    run = Run(folder)
    logs = _take_logs(run, folder)
    _take_checkpoint(run, _near(logs, find_files(folder, "*.ckpt")))
    if not run.record:
        _take_record_file(run, _near(logs, find_files(folder, "*.record.txt", "record.txt")))
    if not (run.metrics.series or run.monitor or run.checkpoint or run.record):
        said = "".join(f"\n{note}" for note in run.notes)
        raise FileNotFoundError(
            f"'{folder}' holds nothing to report. Looked for, in it and below: {METRICS_FILE} (of CSVLogger), "
            f"{MONITOR_FILE} (of QuantMonitor), *.ckpt (of a training with QuantRetrainCallback), record.txt and "
            f"*.record.txt. Give the folder that the Trainer wrote to (default_root_dir, the logger's save_dir).{said}"
        )
    return run


def _take_logs(run: Run, folder: Path) -> list[Path]:
    """Read the logs of the newest run; return where they are."""
    metrics: dict[Path, Metrics] = {}
    notes: dict[Path, list[str]] = defaultdict(list)
    for path in find_files(folder, METRICS_FILE):
        with _noting(path, run.notes):
            metrics[path.parent] = read_metrics(path, notes[path.parent])
    chosen = choose_log_folders([*metrics], lambda place: metrics[place].steps, run.notes)
    run.metrics = join_metrics([metrics[place] for place in chosen])
    run.notes += [note for place in chosen for note in notes[place]]
    run.files += [place / METRICS_FILE for place in chosen]
    return [*chosen, *_take_monitor(run, find_files(folder, MONITOR_FILE), chosen)]


def _take_monitor(run: Run, paths: list[Path], log_folders: list[Path]) -> list[Path]:
    """Read what QuantMonitor wrote beside the metrics; else where no other run's metrics are.

    With several loggers QuantMonitor writes to the folder of the first one, without a logger to that of the run.
    """
    near = [path for path in paths if path.parent in log_folders]
    near = near or [path for path in paths if not (path.parent / METRICS_FILE).exists()]
    monitors: dict[Path, Monitor] = {}
    for path in near:
        with _noting(path, run.notes):
            monitors[path.parent] = read_monitor(path, run.notes)
    chosen = [place for place in log_folders if place in monitors]
    chosen = chosen or choose_log_folders([*monitors], lambda place: all_steps(monitors[place]), run.notes)
    run.monitor = join_monitors([monitors[place] for place in chosen])
    run.files += [place / MONITOR_FILE for place in chosen]
    return chosen


@contextmanager
def _noting(path: Path, notes: list[str]) -> Iterator[None]:
    """Leave out a file that cannot be read, with a note."""
    try:
        yield
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error.strerror or error}).")


def _near(log_folders: list[Path], paths: list[Path]) -> list[Path]:
    """Prefer files that lie in the log folders: Lightning's default place for checkpoints."""
    inside = [path for path in paths if any(folder in path.parents for folder in log_folders)]
    return inside or paths


def _take_checkpoint(run: Run, paths: list[Path]) -> None:
    for path in paths[:_TRIES]:
        try:
            run.checkpoint = read_facts(path, run.notes)
        except (OSError, RuntimeError, ValueError) as error:
            run.notes.append(str(error))
            continue
        run.files.append(path)
        _take_record(run, run.checkpoint)
        return


def _take_record(run: Run, checkpoint: CheckpointFacts) -> None:
    if checkpoint.record is not None:
        run.record, run.record_source = checkpoint.record, f"the checkpoint {checkpoint.path.name}"


def _take_record_file(run: Run, paths: list[Path]) -> None:
    for path in paths[:_TRIES]:
        try:
            run.record, run.record_source = QuantRecord.load(path), os.fspath(path)
        except (OSError, ValueError) as error:
            run.notes.append(str(error))
            continue
        run.files.append(path)
        return
