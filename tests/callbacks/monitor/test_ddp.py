"""QuantMonitor with two CPU processes: the statistics of both, one file, and no process that waits for ever."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from amct_lightning.monitor_format import FILE_NAME
from tests.callbacks.conftest import BATCH, Net, TrainerFactory, loader

CONFIG = {"activations": {"clip_max": 1.0, "clip_min": -1.5}}
"""Given clips: processes that calibrate on their own data would have others than one with all of it."""

SCRIPT = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from torch import nn
from amct_lightning import QuantRetrainCallback
from amct_lightning.callbacks.monitor.monitor import QuantMonitor
from tests.callbacks.conftest import Net, loader
from tests.callbacks.monitor.test_ddp import CONFIG

class Uneven(Net):
    '''One layer runs in the second process only.'''
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 3)

    def forward(self, x):
        y = self.net(x)
        return self.extra(y) if not self.training or self.global_rank == 1 else y

out = Path(sys.argv[1])
pl.seed_everything(0)
monitor = QuantMonitor(every_n_steps=1, verbose=False)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_epochs=2, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
    callbacks=[QuantRetrainCallback(CONFIG), monitor],
)
trainer.fit(Uneven(), torch.utils.data.DataLoader(loader(batches=4).dataset, 16))
found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("quant/")}
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(folder / "train.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


def _rows(folder: Path, layer: str) -> list[dict[str, str]]:
    with (folder / FILE_NAME).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["layer"] == layer]


def test_the_statistics_are_those_of_all_processes(
    two_processes: Path, make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    """The first layer reads the data, so one process with twice the batch sees the same in the first step."""
    data = torch.utils.data.DataLoader(loader(batches=4).dataset, 4 * BATCH)
    make_trainer(callbacks=[QuantRetrainCallback(CONFIG), QuantMonitor(1, verbose=False)]).fit(Net(), data)
    names = ("saturation_low", "saturation_high", "utilisation", "sqnr_input_db")
    both, one = (_rows(folder, "net.0") for folder in (two_processes, tmp_path))
    assert len(both) == len(one) == 2
    first = [[float(rows[0][name]) for name in names] for rows in (both, one)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_layer_that_runs_in_one_process_is_seen(two_processes: Path) -> None:
    assert all(row["sqnr_input_db"] for row in _rows(two_processes, "extra"))


def test_all_processes_know_the_same(two_processes: Path) -> None:
    first, second = (json.loads((two_processes / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "quant/sqnr_input_db_min" in first
