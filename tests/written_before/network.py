"""The network and the training that wrote `files/`, and that goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning import QuantMonitor, QuantRetrainCallback
from tests.sums import SumsRoundedOnce

FILES = Path(__file__).with_name("files")
CHOICES = {"batch_num": 3}
CHOICES_THEN = CHOICES | {"activations": {"fixed_min": "after_relu"}}
"""What the same choices meant when the files were written: fixed_min had AMCT's rule by default."""


class Net(pl.LightningModule):
    """Convolution, BatchNorm, ReLU, and two layers that share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.left, self.right = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.left(x) + self.right(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    """Two batches an epoch, in the same order each time."""
    numbers = torch.arange(2 * 4 * 2 * 4 * 4, dtype=torch.float32)
    x = torch.sin(numbers * 0.7).reshape(8, 2, 4, 4)
    return DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=4)


def fit(folder: Path, epochs: int, resume: Path | None = None, config: Any = CHOICES) -> Net:
    """Train from the weights in `files/init.pt`, the same on every CPU; the calibration takes one and a half epochs.

    Args:
        folder: Where the run writes.
        epochs: Number of the epoch to end with.
        resume: A checkpoint to go on from.
        config: What is quantized and how.
    """
    model = Net()
    model.load_state_dict(torch.load(FILES / "init.pt", weights_only=True))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=[
            QuantRetrainCallback(config=config, record_file=folder / "record.txt"),
            QuantMonitor(every_n_steps=1),
            ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1),
        ],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with SumsRoundedOnce():
        trainer.fit(model, batches(), ckpt_path=resume, weights_only=True if resume else None)
    return model
