"""Settings that are changed when a run resumes: told, and the new ones used, or refused; never silently the old."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import Net, TrainerFactory, loader


class Adam(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def schedule(batches: int | None) -> dict[str, object]:
    return {"calibrate": [0, 1], **({} if batches is None else {"calibrate_batches": batches})}


@pytest.fixture
def path(make_trainer: TrainerFactory, tmp_path: Path) -> Path:
    callback = QuantRetrainCallback(record_file=tmp_path / "r.txt", schedule=schedule(2))
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(Adam(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("config", [None, "INT8"])
def test_another_number_of_calibration_batches_is_refused(
    path: Path, make_trainer: TrainerFactory, config: str | None
) -> None:
    callback = QuantRetrainCallback(config, record_file=path.with_name("r.txt"), schedule=schedule(6))
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    with pytest.raises(ValueError, match=r"a\.ckpt' .*batch_num is 2 there and 6 here.*calibrate_batches"):
        trainer.fit(Adam(), loader(), ckpt_path=path)


@pytest.mark.parametrize("batches", [None, 2])
def test_the_same_number_and_none_go_on(path: Path, make_trainer: TrainerFactory, batches: int | None) -> None:
    callback = QuantRetrainCallback(record_file=path.with_name("r.txt"), schedule=schedule(batches))
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint was written with")
        trainer.fit(Adam(), loader(), ckpt_path=path)
    assert trainer.current_epoch == 2


def test_an_evaluation_does_not_mind(path: Path, make_trainer: TrainerFactory) -> None:
    callback = QuantRetrainCallback(record_file=path.with_name("r.txt"), schedule=schedule(6))
    make_trainer(callbacks=[callback]).validate(Adam(), loader(1), ckpt_path=path, verbose=False)


def test_a_second_training_of_the_model_refuses_it_as_well(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Adam()
    for batches in (2, 6):
        callback = QuantRetrainCallback(record_file=tmp_path / "r.txt", schedule=schedule(batches))
        trainer = make_trainer(callbacks=[callback], max_epochs=1)
        if batches == 2:
            trainer.fit(model, loader())
            continue
        with pytest.raises(ValueError, match=r"batch_num is 2 there and 6 here"):
            trainer.fit(model, loader())


def test_another_rate_of_the_clips_is_used_and_told(path: Path, make_trainer: TrainerFactory) -> None:
    callback = QuantRetrainCallback(record_file=path.with_name("r.txt"), schedule=schedule(2), quant_lr_scale=0.01)
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    with pytest.warns(UserWarning, match=r"written with quant_lr_scale=1\.0, .* now go on with 0\.01 times"):
        trainer.fit(Adam(), loader(), ckpt_path=path)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.0001]
