"""A page parsed as a browser would, log files written by hand, and one real run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from amct_lightning import QuantMonitor, QuantRetrainCallback, QuantSchedule
from amct_lightning.run_report import write_report
from tests.callbacks.conftest import Net, loader

MONITOR = [
    "step",
    "epoch",
    "layer",
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
]


class Page(HTMLParser):
    """What is on a page: its text by section, its tables, its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.facts: dict[str, str] = {}
        self._open: list[str] = []
        self._section, self._caption, self._term = "", "", ""
        self._row: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "wbr"):
            return
        self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self._row = []
        elif tag in ("th", "td"):
            self._row.append("")
        elif tag in ("dt",):
            self._term = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append(self._row)

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data
        inside = self._open[-1] if self._open else ""
        if inside == "caption":
            self._caption += data
        elif inside in ("th", "td"):
            self._row[-1] += data
        elif inside == "dt":
            self._term += data
        elif inside == "dd":
            self.facts[self._term] = self.facts.get(self._term, "") + data

    def rows(self, caption: str) -> list[dict[str, str]]:
        head, *rows = next(table for name, table in self.tables.items() if name.startswith(caption))
        return [dict(zip(head, row, strict=True)) for row in rows]

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name]


def report(source: Path, name: str = "report.html") -> Page:
    """Write the report of a source beside it and parse it."""
    output = source.parent / "reports" / name
    return Page(write_report(source, output).read_text(encoding="utf-8"))


def write_csv(path: Path, titles: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(titles), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_metrics(folder: Path, steps: Iterable[int], **metrics: Any) -> Path:
    """Write a metrics.csv; a metric is a number, or a function of the step."""
    rows = [
        {"epoch": step // 100, "step": step} | {name: m(step) if callable(m) else m for name, m in metrics.items()}
        for step in steps
    ]
    return write_csv(folder / "metrics.csv", ["epoch", "step", *metrics], rows)


def write_monitor(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    return write_csv(folder / "quant_monitor.csv", MONITOR, rows)


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all that there is: schedule, monitor, metrics, checkpoints, records."""
    folder = tmp_path_factory.mktemp("real")
    schedule = QuantSchedule(start=1, freeze_data=3, freeze_weights=3)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[
            QuantRetrainCallback(record_file=folder / "record.txt", schedule=schedule),
            QuantMonitor(every_n_steps=2, verbose=False),
            ModelCheckpoint(save_last=True),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), loader(), loader(1))
    return folder
