"""Saving a checkpoint reads the device once for the record, however many layers there are."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback
from tests.operators import Operators, Reads


class Deep(pl.LightningModule):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        layers = [
            layer for _ in range(blocks) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
        ]
        self.net, self.example_input_array = nn.Sequential(*layers), torch.randn(2, 2, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("blocks", [2, 6])
def test_the_reads_of_a_checkpoint_do_not_grow_with_the_number_of_layers(blocks: int, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[QuantRetrainCallback()],
    )
    trainer.fit(Deep(blocks), DataLoader([torch.randn(2, 4, 4)] * 8, batch_size=2))
    with Operators() as operators, Reads() as reads:
        trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert len(QuantRecord.load(tmp_path / "one.record.txt")) == blocks
    assert operators.host_reads == {}
    assert reads.counts == {"cpu": 1, "numpy": 1}
