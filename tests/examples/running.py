"""How the tests run scripts and YAML files: as a user does, in a folder of their own."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amct_lightning.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Small networks are not faster with two, and much slower when something else runs beside them."""


def command(script: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), "--out", str(out), *arguments]


def run(arguments: list[str], folder: Path | None = None) -> str:
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def fit(monkeypatch: pytest.MonkeyPatch, folder: Path, config: str, *options: str) -> None:
    """Run the command in ``folder``, which has the examples in it as the root of the repository has."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(folder)
    quiet = "--trainer.enable_progress_bar=false"
    assert main(["fit", "--config", f"examples/{config}.yaml", quiet, *options]) == 0


def printed_accuracies(printed: str, row: str) -> list[float]:
    """Return the percentages in the row of a table that begins with a word."""
    line = next(line for line in printed.splitlines() if re.match(rf"│ +{row}\b", line))
    return [float(value) for value in re.findall(r"(\d+\.\d)%", line)]


def last_accuracy(logs: Path) -> float:
    """Return the last ``val_acc`` that a run has logged, in percent."""
    with next(logs.rglob("metrics.csv")).open() as file:
        return [100 * float(row["val_acc"]) for row in csv.DictReader(file) if row.get("val_acc")][-1]
