"""Together with weight averaging, every record is that of the weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from tests.callbacks.conftest import Net, TrainerFactory, loader


def ema() -> pl.Callback:
    return EMAWeightAveraging(decay=0.6, update_starting_at_step=2)


class NoBatchNorm(Net):
    """SWA would run batches to update the statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()


AVERAGING: list[Any] = [
    pytest.param(Net, ema, id="ema"),
    pytest.param(NoBatchNorm, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1), id="swa"),
]


@pytest.mark.parametrize(("kind", "averaging"), AVERAGING)
def test_the_final_record_is_that_of_the_final_model(
    make_trainer: TrainerFactory, tmp_path: Path, kind: type[Net], averaging: Any
) -> None:
    model, record = kind(), tmp_path / "record.txt"
    make_trainer(callbacks=[QuantRetrainCallback(record_file=record), averaging()], max_epochs=4).fit(model, loader())
    assert QuantRecord.load(record) == QuantRecord.from_model(model)


def test_the_record_beside_a_checkpoint_is_that_of_its_averaged_weights(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    model = Net()
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [QuantRetrainCallback(), ema(), checkpoints]
    make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3).fit(model, loader())
    paths = sorted(tmp_path.glob("epoch=*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        loaded = load_qat_checkpoint(Net(), path)
        record = path.with_name(path.name.replace(".ckpt", ".record.txt"))
        assert QuantRecord.load(record) == QuantRecord.from_model(loaded)


def test_writing_the_record_of_averaged_weights_does_not_touch_the_training(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    def trained(save: bool) -> list[torch.Tensor]:
        model = Net()
        checkpoints = [ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1)] if save else []
        callbacks = [QuantRetrainCallback(), ema(), *checkpoints]
        make_trainer(callbacks=callbacks, enable_checkpointing=save, max_epochs=2).fit(model, loader())
        return list(model.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_averaging_before_quantization_is_refused(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging stands before .* first"):
        make_trainer(callbacks=[ema(), QuantRetrainCallback()]).fit(Net(), loader())
