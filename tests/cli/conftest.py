"""A folder with a module of the user's, and the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from amct_lightning.cli import main

MODULE = '''
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A small classifier.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3)
        )
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Broken(Classifier):
    def training_step(self, batch, batch_idx):
        raise ValueError("a bad batch")


class Interrupted(Classifier):
    def training_step(self, batch, batch_idx):
        raise KeyboardInterrupt


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.dense = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, ids, mask):
        return self.dense(self.embed(ids)) * mask.unsqueeze(-1)


class Noise(pl.LightningDataModule):
    def _loader(self):
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(
            torch.randn(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
        )
        return DataLoader(data, batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader
'''
RUN = {
    "model": "demo_module.Classifier",
    "data": "demo_module.Noise",
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    },
}


class Finished(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Folder:
    """The folder that a user works in."""

    def __init__(self, path: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self.capture = capture

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __call__(self, *arguments: str) -> Finished:
        """Run the command in this process."""
        self.capture.readouterr()
        status = main(arguments)
        return Finished(status, *self.capture.readouterr())

    def run_yaml(self, name: str = "run.yaml", **sections: object) -> str:
        """Write the YAML of a run; a mapping is added to what the section has."""
        content: dict[str, object] = dict(RUN)
        for key, value in sections.items():
            old = content.get(key)
            content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        (self.path / name).write_text(yaml.safe_dump(content))
        return name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Folder]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["amct-lightning"])
    (tmp_path / "demo_module.py").write_text(MODULE)
    yield Folder(tmp_path, capsys)
    sys.modules.pop("demo_module", None)
