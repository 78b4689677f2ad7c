"""The networks of a training are verified on its evaluation batches, however many samples these have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning import QuantRetrainCallback


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def verified(folder: Path, exported: int, evaluated: int, **options: Any) -> dict[str, Any]:
    """Return the verification of a training with batches of ``exported``, evaluated on others."""
    data = TensorDataset(torch.linspace(-1, 1, 4 * 48).view(48, 4))
    callback = QuantRetrainCallback(record_file=folder / "record.txt", export="deploy", export_dir=folder, **options)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), DataLoader(data, exported), DataLoader(data, evaluated))
    report: dict[str, Any] = json.loads((folder / "verification.json").read_text())
    return report


pytestmark = pytest.mark.filterwarnings(
    "ignore:The .* does not have many workers", "ignore:The number of training batches"
)


@pytest.mark.parametrize(
    ("exported", "evaluated", "found"),
    [(4, 4, (1, 4)), (4, 11, (2, 8)), (1, 40, (32, 32)), (8, 2, (1, 8))],
    ids=["as exported", "cut, the rest left out", "not too many", "too few: what it was exported with"],
)
def test_larger_batches_are_cut_as_the_network_takes_them(
    tmp_path: Path, exported: int, evaluated: int, found: tuple[int, int]
) -> None:
    report = verified(tmp_path, exported, evaluated)
    assert report["ok"]
    assert (report["batches"], report["samples"]) == found


def test_the_input_that_shows_the_data_flow_is_not_what_a_network_is_verified_on(tmp_path: Path) -> None:
    """It may be zeros, of which nothing can be seen; but it tells how many samples the network takes."""
    report = verified(tmp_path, 16, 8, input_data=torch.zeros(2, 4))
    assert report["ok"]
    assert (report["batches"], report["samples"]) == (4, 8)
    assert report["forms"][0]["outputs"][0]["step"] is not None
    assert report["forms"][0]["layers"][0]["codes"] == 8 * 4


def test_batches_of_another_kind_than_the_input_leave_that_one(tmp_path: Path) -> None:
    report = verified(tmp_path, 16, 8, input_data=torch.zeros(2, 4), batch_to_input=lambda batch: batch[0].view(-1, 2))
    assert (report["batches"], report["samples"]) == (1, 2)
