"""Search-N under a Trainer: each validation starts anew, the sanity check counts nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from amct_lightning import QuantRecord, QuantRetrainCallback
from amct_lightning.modules.shift_hook import shift_searches
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader


class Batches(pl.Callback):
    """Note how many batches the searches have seen."""

    def __init__(self) -> None:
        self.after_sanity: list[int] = []
        self.after_validation: list[int] = []

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after_sanity += [int(search.batches) for search in shift_searches(pl_module)]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.after_validation += [int(search.batches) for search in shift_searches(pl_module)]


@pytest.mark.usefixtures("every_execution")
def test_every_validation_is_searched_anew_and_the_record_has_the_result(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    batches, record = Batches(), tmp_path / "record.txt"
    callback = QuantRetrainCallback(record_file=record, search_n=True)
    make_trainer(callbacks=[callback, batches], max_epochs=2).fit(Net(), loader(), loader(1))
    assert batches.after_sanity == [0, 0]
    assert batches.after_validation == [BATCHES] * 4
    assert all(layer.shift_bit for layer in QuantRecord.load(record).values())


@pytest.mark.usefixtures("every_execution")
def test_the_search_resumes_with_the_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(search_n=True)])
    trainer.fit(model, loader(), loader(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(search_n=True)])
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt")
    for here, there in zip(shift_searches(resumed), shift_searches(model), strict=True):
        assert torch.equal(here.errors, there.errors)


def test_the_sanity_check_warns_of_nothing(make_trainer: TrainerFactory) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Net(), loader(), loader(1))
    assert not [w for w in caught if "run in float" in str(w.message)]


def test_a_validation_before_training_says_that_layers_run_in_float(make_trainer: TrainerFactory) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[QuantRetrainCallback()]).validate(Net(), loader(), verbose=False)
    found: list[Any] = [w for w in caught if "run in float" in str(w.message)]
    assert found
    assert "amct_lightning" in found[0].filename


class Synchronizes(pl.Callback):
    """Does what ``sync_batchnorm=True`` does, which CPU processes cannot run."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(pl_module)


def test_shifts_are_searched_behind_a_synchronized_batch_norm(make_trainer: TrainerFactory) -> None:
    model = Net()
    make_trainer(callbacks=[Synchronizes(), QuantRetrainCallback(search_n=True)]).fit(model, loader(), loader(1))
    assert all(layer.shift_bit for layer in QuantRecord.from_model(model).values())
