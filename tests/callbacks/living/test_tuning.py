"""After a search for the learning rate or the batch size, training goes as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback
from tests.callbacks.conftest import Net, TrainerFactory, loader

ULQ = {"weights": {"algo": "ulq_retrain"}, "batch_num": 3}
DUE = {"start": 1, "freeze_data": 2, "freeze_weights": 2, "freeze_bn": 2}


class Tuned(Net):
    def __init__(self, lr: float = 1e-3, batch_size: int = 8) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(loader(batches=8).dataset, self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return loader(1)


def quantize(**settings: Any) -> QuantRetrainCallback:
    return QuantRetrainCallback(**{"config": ULQ, "quant_lr_scale": 0.1, **settings})


def lr_finder() -> LearningRateFinder:
    return LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=20)


def assert_trained_alike(trainer: pl.Trainer, model: Tuned, make_trainer: TrainerFactory, callback: Any) -> None:
    """Compare a trained model, and its optimizer, with one that was given the learning rate and batch size."""
    other = Tuned(model.lr, model.batch_size)
    plain = make_trainer(callbacks=[callback], max_epochs=3)
    plain.fit(other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    groups = [
        [{key: group[key] for key in ("lr", "weight_decay")} for group in t.optimizers[0].param_groups]
        for t in (trainer, plain)
    ]
    assert groups[0] == groups[1]
    assert trainer.global_step == plain.global_step


@pytest.mark.parametrize("schedule", [None, DUE], ids=["no schedule", "schedule"])
@pytest.mark.parametrize("first", [True, False], ids=["after", "before"])
def test_learning_rate_finder(make_trainer: TrainerFactory, tmp_path: Path, first: bool, schedule: Any) -> None:
    model, callback = Tuned(), quantize(schedule=schedule)
    callbacks = [callback, lr_finder()] if first else [lr_finder(), callback]
    trainer = make_trainer(callbacks=callbacks, max_epochs=3)
    trainer.fit(model)
    assert model.lr != 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["record.txt"]
    assert_trained_alike(trainer, model, make_trainer, quantize(schedule=schedule))


@pytest.mark.parametrize("schedule", [None, DUE], ids=["no schedule", "schedule"])
@pytest.mark.parametrize("first", [True, False], ids=["after", "before"])
def test_batch_size_finder(make_trainer: TrainerFactory, tmp_path: Path, first: bool, schedule: Any) -> None:
    model, callback = Tuned(), quantize(schedule=schedule)
    finder = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=3)
    callbacks = [callback, finder] if first else [finder, callback]
    trainer = make_trainer(callbacks=callbacks, max_epochs=3)
    trainer.fit(model)
    assert model.batch_size == 16
    assert [path.name for path in tmp_path.iterdir()] == ["record.txt"]
    assert_trained_alike(trainer, model, make_trainer, quantize(schedule=schedule))


def test_tuner(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Tuned()
    trainer = make_trainer(callbacks=[quantize()], max_epochs=3)
    tuner = Tuner(trainer)
    tuner.lr_find(model, min_lr=1e-4, max_lr=1e-1, num_training=20)
    tuner.scale_batch_size(model, steps_per_trial=2, init_val=4, max_trials=3)
    assert not list(tmp_path.iterdir())
    assert all(layer.input_quantizer.calibrating for layer in (model.net[0], model.net[4]))
    trainer.fit(model)
    assert_trained_alike(trainer, model, make_trainer, quantize())


def test_a_search_with_a_trained_model_leaves_its_factors_alone(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model, record = Tuned(), tmp_path / "record.txt"
    make_trainer(callbacks=[quantize()]).fit(model)
    before, text = QuantRecord.from_model(model), record.read_text()
    Tuner(make_trainer(callbacks=[quantize()])).lr_find(model, min_lr=1e-4, max_lr=1e-1, num_training=20)
    assert QuantRecord.from_model(model) == before
    assert record.read_text() == text
