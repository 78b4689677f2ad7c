"""Training on the device's grid under a Trainer: the choice goes with the checkpoint, and with other BatchNorms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from amct_lightning import QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.callbacks.modes import begin_evaluation
from amct_lightning.modules.grid.norm import FoldedNorm
from tests.callbacks.conftest import Net, TrainerFactory, loader


@pytest.fixture
def checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> tuple[Net, Path]:
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(deploy_grid=True)], max_epochs=2)
    trainer.fit(model, loader(), loader(1))
    trainer.save_checkpoint(tmp_path / "grid.ckpt")
    return model.eval(), tmp_path / "grid.ckpt"


@torch.no_grad()
def test_a_checkpoint_brings_the_grid_back(checkpoint: tuple[Net, Path]) -> None:
    (model, path), x = checkpoint, next(iter(loader(2)))[0]
    loaded = load_qat_checkpoint(Net(), path).eval()
    assert isinstance(loaded.net[1], FoldedNorm)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.net[0](x), loaded.net[1](loaded.net[0](x)))


def test_a_run_resumes_on_the_grid_of_its_checkpoint(
    checkpoint: tuple[Net, Path], make_trainer: TrainerFactory
) -> None:
    resumed = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=checkpoint[1])
    assert resumed.net[0].deploy_grid


def test_a_checkpoint_without_the_grid_is_not_put_on_it_silently(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = make_trainer(callbacks=[QuantRetrainCallback(deploy_grid=True)])
    with pytest.raises(ValueError, match="deploy_grid is False there and True here"):
        trainer.fit(Net(), loader(), ckpt_path=tmp_path / "plain.ckpt")


@torch.no_grad()
def test_a_batch_norm_that_a_strategy_replaces_is_folded_in_the_next_evaluation(checkpoint: tuple[Net, Path]) -> None:
    model, x = checkpoint[0], next(iter(loader(2)))[0]
    expected = model(x)
    model.net = nn.SyncBatchNorm.convert_sync_batchnorm(model.net)
    begin_evaluation(model, searches=False)
    assert isinstance(model.net[1], nn.SyncBatchNorm)
    assert torch.equal(model(x), expected)


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"deploy_grid='yes'"):
        QuantRetrainCallback(deploy_grid="yes")  # type: ignore[arg-type]
