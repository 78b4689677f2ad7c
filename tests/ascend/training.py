"""A small model for CPU and NPU, and a Trainer that makes no noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import amct_lightning.ascend  # noqa: F401  # makes "npu" and "ascend" known to Lightning
from amct_lightning import QuantRetrainCallback

NPU: dict[str, Any] = {"accelerator": "npu", "strategy": "ascend", "devices": 1}
CPU: dict[str, Any] = {"accelerator": "cpu", "devices": 1}


class Net(pl.LightningModule):
    """conv - bn - relu - linear, optionally with dropout; remembers its losses."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        self.dropout = nn.Dropout(dropout)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        noise = torch.rand(3, device=self.device)  # uses the generator of the device
        self.log("val_loss", functional.cross_entropy(self(x), y) + 0 * noise.sum(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def loader(batches: int = 4, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * batch_size, 2, 4, 4, generator=generator)
    y = torch.randint(0, 3, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def make_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**quiet, **settings})


def fit(
    folder: Path, *, quantize: bool = False, dropout: float = 0.0, seed: int = 0, batches: int = 4, **settings: Any
) -> tuple[list[float], pl.Trainer]:
    """Train, validating too; the losses of the steps, and the trainer."""
    model = Net(dropout)  # seeds
    pl.seed_everything(seed, verbose=False)
    checkpoint = settings.pop("ckpt_path", None)
    if quantize:
        settings["callbacks"] = [*settings.get("callbacks", []), QuantRetrainCallback(record_file=folder / "r.txt")]
    trainer = make_trainer(folder, **settings)
    trainer.fit(model, loader(batches), loader(1), ckpt_path=checkpoint)
    return [loss.item() for loss in model.losses], trainer


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) > 0
    return max(abs(a - b) for a, b in zip(first, second, strict=True))
