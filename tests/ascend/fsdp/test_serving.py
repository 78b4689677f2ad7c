"""Checkpoints for servers of sharded models: the files are those of copies, and one layer at a time is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from amct_lightning import save_serving
from tests.ascend.fsdp.sharded import Transformer, run
from tests.ascend.fsdp.test_checkpoints import shared


class Still(Transformer):
    """Calibrates and trains without moving, so that both strategies have the same numbers to the bit."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Save(pl.Callback):
    """Saves when the training ends, on all ranks, and looks at what is there when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder = save_serving(
            pl_module, shared(self.folder) / f"{type(trainer.strategy).__name__}", largest_file=900
        )
        self.found = sorted(path.name for path in self.folder.glob("*"))  # ranks with copies go on before rank 0


def saved(folder: Path, strategy: str) -> tuple[Path, list[str]]:
    save = Save(folder)
    settings: Any = {"config": {"batch_num": 2}, "target": "serving"}
    run(folder, Still(), strategy=strategy, quantize=settings, callbacks=[save], max_epochs=1, batches=4)
    return save.folder, save.found


@pytest.mark.npu(nproc=2)
def test_sharded_and_copied_models_give_equal_files(tmp_path: Path) -> None:
    sharded, found = saved(tmp_path, "ascend_fsdp")
    copied, _ = saved(tmp_path, "ascend")
    dist.barrier()
    assert found == sorted(path.name for path in sharded.iterdir())  # no rank goes on before all is there
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (sharded, copied))
    assert ours == theirs
    assert "quant_model_weights.safetensors.index.json" in ours
