"""A training run as a script, ``launched.py FOLDER OPTIONS``, for tests about starting and ending processes.

OPTIONS is JSON: the arguments of `train`. Every rank writes its losses to FOLDER/losses-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from amct_lightning import QuantRetrainCallback
from amct_lightning.ascend import AscendStrategy
from tests.ascend.training import Net, loader, make_trainer


class Accident(pl.Callback):
    """What happens to one rank after some steps."""

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if (trainer.global_step, trainer.global_rank) != (self.step, self.rank):
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "Ctrl-C":  # the terminal sends it to all processes
            os.killpg(0, signal.SIGINT)
        else:
            raise ValueError(self.kind)


class Unable(AscendStrategy):
    """One rank ends before it is connected with the others."""

    def __init__(self, rank: int, kind: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.unable, self.kind = rank, kind

    def setup_environment(self) -> None:
        if self.local_rank == self.unable:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(self.kind)
        super().setup_environment()


class WriteLosses(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses = [loss.item() for loss in pl_module.losses]
        (self.folder / f"losses-{trainer.global_rank}.json").write_text(json.dumps(losses))


def train(
    folder: Path,
    *,
    start_method: str = "popen",
    accident: list[Any] | None = None,
    ckpt_path: str | None = None,
    unable: tuple[int, str] = (-1, ""),
    workers: int = 0,
    seed: int = 0,
    **settings: Any,
) -> pl.Trainer:
    """Train `Net` with 8 batches in all, with a record and a checkpoint after every epoch."""
    callbacks = [
        QuantRetrainCallback(record_file=folder / "record.txt"),
        ModelCheckpoint(folder, save_last=True, filename="{epoch}"),
        WriteLosses(folder),
        *([Accident(*accident)] if accident else []),
    ]
    model = Net()
    pl.seed_everything(seed, verbose=False)
    strategy = Unable(*unable, start_method=start_method)
    defaults = {"devices": 2, "strategy": strategy, "enable_checkpointing": True}
    trainer = make_trainer(folder, accelerator="npu", callbacks=callbacks, **{**defaults, **settings})
    data = DataLoader(loader(8).dataset, 8, num_workers=workers)
    trainer.fit(model, data, loader(1), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    print("done")
