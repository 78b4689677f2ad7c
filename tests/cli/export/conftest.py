"""A trained run in the folder that a user works in, and what is looked at after an export."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from amct_lightning.cli import main
from tests.cli.conftest import MODULE, RUN, Finished, Folder

MORE = """
from collections import OrderedDict

class Tokens(pl.LightningModule):
    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net, self.embed = net, nn.Embedding(10, size)

    def forward(self, ids, mask, scale=None):
        return {"scores": self.net(self.embed(ids)) * mask.unsqueeze(-1)}

    def training_step(self, batch, batch_idx):
        return self(*batch)["scores"].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Sentences(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(80).view(16, 5) % 10, torch.ones(16, 5)), batch_size=8)
"""
TOKENS: dict[str, Any] = {
    "model": {"class_path": "demo_module.Tokens", "init_args": {"net": {"class_path": "torch.nn.Linear"}, "size": 8}},
    "data": "demo_module.Sentences",
}
TOKENS["model"]["init_args"]["net"]["init_args"] = {"in_features": 8, "out_features": 3}
SHAPES = ("--input-shape", "ids=1,5:int64", "--input-shape", "mask=1,5")
MODEL = ("--model", "run.yaml")
Trained = Callable[..., None]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train once for each set of options, with the command itself; the checkpoint is in the folder."""
    made: dict[str, Path] = {}

    def run(content: dict[str, Any], *options: str) -> Path:
        key = repr((content, options))
        if key not in made:
            made[key] = path = tmp_path_factory.mktemp("run")
            before = Path.cwd()
            os.chdir(path)
            try:
                (path / "demo_module.py").write_text(MODULE + MORE)
                (path / "run.yaml").write_text(json.dumps(content))
                assert main(["fit", "--config", "run.yaml", *options]) == 0
                next(path.glob("checkpoints/*.ckpt")).rename(path / "last.ckpt")
            finally:
                os.chdir(before)
                sys.modules.pop("demo_module", None)
        return made[key]

    return run


@pytest.fixture
def trained(folder: Folder, runs: Callable[..., Path]) -> Trained:
    """Put ``run.yaml`` and the checkpoint of its run, ``last.ckpt``, into the folder that the user works in."""

    def give(*options: str, **sections: Any) -> None:
        trainer = {**RUN["trainer"], "enable_checkpointing": True}  # type: ignore[dict-item]
        path = runs({**RUN, "trainer": trainer, **sections}, *options)
        for name in ("demo_module.py", "run.yaml", "last.ckpt"):
            shutil.copy(path / name, folder / name)

    return give


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def written(folder: Folder, pattern: str = "last_*") -> list[str]:
    return sorted(path.name for path in folder.path.rglob(pattern))


def run_onnx(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    output: np.ndarray = session.run(None, given)[0]
    return output


def one_line(finished: Finished) -> str:
    return " ".join(finished.err.split())
