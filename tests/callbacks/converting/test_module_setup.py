"""The conversion takes place once the LightningModule has set itself up, whatever it makes there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint, quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader


class HeadInSetup(Net):
    stages: list[str]

    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]
        if not hasattr(self, "head"):
            self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_layers_that_setup_makes_are_quantized(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = HeadInSetup()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0", "net.4", "head"]
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4", "head"]


def test_setup_is_called_once_in_each_stage(make_trainer: TrainerFactory) -> None:
    model = HeadInSetup()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    make_trainer(callbacks=[QuantRetrainCallback()]).test(model, loader(), verbose=False)
    assert model.stages == ["fit", "test"]
    assert "setup" not in vars(model)


def test_data_that_setup_makes_shows_the_data_flow(make_trainer: TrainerFactory) -> None:
    class DataInSetup(Net):
        def setup(self, stage: str) -> None:
            self.data = loader().dataset

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, 8)

    model = DataInSetup()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model)
    assert len(quantized_layers(model)) == 2


def test_a_setup_that_was_broken_off_is_called_again(make_trainer: TrainerFactory) -> None:
    class Fails(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("not today")

    model = HeadInSetup()
    with pytest.raises(RuntimeError, match="not today"):
        make_trainer(callbacks=[QuantRetrainCallback(), Fails()]).fit(model, loader())
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert model.stages == ["fit", "fit"]


def test_callbacks_after_it_copy_the_complete_and_converted_model(make_trainer: TrainerFactory) -> None:
    seen: list[list[str]] = []

    class Copies(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            seen.append(list(quantized_layers(copy.deepcopy(pl_module))))

    callbacks = [QuantRetrainCallback(), StochasticWeightAveraging(1e-3, swa_epoch_start=1), Copies()]
    make_trainer(callbacks=callbacks, max_epochs=3).fit(HeadInSetup(), loader())
    assert seen == [["net.0", "net.4", "head"]]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_layers_that_come_later_are_named(make_trainer: TrainerFactory, hook: str) -> None:
    class Later(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return self.head(y) if hasattr(self, "head") else y

    def make_head(self: Later) -> None:
        self.head = nn.Linear(3, 3)

    setattr(Later, hook, make_head)
    with pytest.warns(UserWarning, match=r"'head' came after the conversion.*instead of (on_fit_start|a hook)"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Later(), loader())


def test_a_teacher_copied_in_setup_stays_in_float_and_does_not_keep_the_record(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    class WithTeacher(Net):
        def setup(self, stage: str) -> None:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()

    model = WithTeacher()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(model, loader())
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4"]
    assert not quantized_layers(model.teacher)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="also holds 'teacher', which Net lacks"):
        loaded = load_qat_checkpoint(Net(), tmp_path / "last.ckpt")
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
