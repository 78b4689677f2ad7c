"""Interrupted in any phase and resumed, a run ends like the uninterrupted one, to the bit."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils._pytree import tree_flatten

from amct_lightning import QuantRetrainCallback, QuantSchedule
from amct_lightning.callbacks import AtomicCheckpointIO
from tests.callbacks.conftest import BATCHES, Net, loader

EPOCHS = 8
SCHEDULES = {
    "phases": QuantSchedule(
        calibrate=[1, 5],
        start=2,
        calibrate_batches=9,  # more than two epochs have
        freeze_bn=3,
        freeze_weights=4,
        freeze_data=7,
        layers={"net.4": {"calibrate": 3, "start": 3, "freeze_weights": None}},
    ),
    "updates": QuantSchedule(update_every_n_steps=3, freeze_weights=0.75),
    "epochs": QuantSchedule(update_every_n_epochs=2, calibrate=[0, 4]),
}


class Logged(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Dies(pl.Callback):
    """Ends the process without a word at a given batch, counted over all epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.batch:
            os.kill(os.getpid(), 9)


def train(out: Path, schedule: str, algo: str, resume: Path | None = None, dies: int = -1) -> None:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=CSVLogger(out, name="logs"),
        log_every_n_steps=1,
        callbacks=[
            QuantRetrainCallback({"weights": {"algo": algo}}, out / "record.txt", schedule=SCHEDULES[schedule]),
            ModelCheckpoint(out, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False),
            Dies(dies),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Logged(), loader(), loader(1), ckpt_path=resume)


def end_of(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_same(one: Path, two: Path) -> None:
    """Compare weights, factors, optimizer, schedulers and records of the last checkpoints of two runs."""
    left, right = end_of(one), end_of(two)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "amct_lightning"):
        (a, spec_a), (b, spec_b) = tree_flatten(left[key]), tree_flatten(right[key])
        assert spec_a == spec_b
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)), key
    assert (one / "record.txt").read_bytes() == (two / "record.txt").read_bytes()


def metrics(out: Path) -> dict[tuple[int, str], str]:
    """Return what was logged last for each step."""
    found = {}
    for path in sorted(out.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        for row in csv.DictReader(path.open()):
            found |= {(int(row["step"]), k): v for k, v in row.items() if v and k not in ("step", "epoch")}
    return found


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_from_the_end_of_every_epoch(tmp_path: Path, schedule: str, algo: str) -> None:
    train(tmp_path / "whole", schedule, algo)
    expected = metrics(tmp_path / "whole")
    assert {name for _, name in expected} == {"loss", "val_loss", "quant_phase"}
    for epoch in range(EPOCHS - 1):
        out = tmp_path / f"from{epoch}"
        train(out, schedule, algo, resume=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(tmp_path / "whole", out)
        resumed = metrics(out)
        assert len(resumed) >= (EPOCHS - 1 - epoch) * BATCHES * 2
        assert all(expected[key] == value for key, value in resumed.items())


RUN = """
import sys
from pathlib import Path
from tests.callbacks.checkpoints.test_resume_phases import train
out = Path(sys.argv[1])
last = out / "last.ckpt"
train(out, "phases", "ulq_retrain", last if last.exists() else None, int(sys.argv[2]))
"""


def test_killed_in_every_phase(tmp_path: Path) -> None:
    moments = sorted(random.sample(range(1, EPOCHS * BATCHES), 3))
    print("killed after the steps", moments)
    for moment in [*moments, -1]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / "killed"), str(moment)],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert finished.returncode == (-9 if moment > 0 else 0), finished.stderr[-2000:]
    torch.set_num_threads(1)
    train(tmp_path / "whole", "phases", "ulq_retrain")
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert metrics(tmp_path / "whole").items() >= metrics(tmp_path / "killed").items()
