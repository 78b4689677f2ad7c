"""Loops over parameters() that do not know of clips are told; those over float_parameters() work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from amct_lightning import (
    QuantRecord,
    QuantRetrainCallback,
    float_parameters,
    load_qat_checkpoint,
    quantized_layers,
)
from tests.callbacks.conftest import Net, TrainerFactory, loader

Parameters = Callable[[nn.Module], Any]


class WithTeacher(Net):
    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.parameters_of = parameters

    def on_train_batch_end(self, *_: Any) -> None:
        for old, new in zip(self.parameters_of(self.teacher), self.parameters_of(self.net), strict=False):
            old.data = 0.9 * old.data + 0.1 * new.data


class Broadcasts(WithTeacher):
    """A number goes with the weights of linear layers, where that of a convolution would raise an error."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


class MadeLater(Broadcasts):
    """A teacher that a hook of the training makes."""

    def __init__(self, parameters: Parameters, epoch: int) -> None:
        super().__init__(parameters)
        self.epoch, self.hidden = epoch, [self.teacher]
        del self.teacher

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.epoch:
            teacher = self.hidden[0]
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), float_parameters(self.net), strict=True):
                    old.copy_(new)
            self.teacher = teacher

    def on_train_batch_end(self, *args: Any) -> None:
        if hasattr(self, "teacher"):
            super().on_train_batch_end(*args)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_teacher_that_is_made_in_the_training_is_looked_at_as_well(make_trainer: TrainerFactory, epoch: int) -> None:
    with pytest.warns(UserWarning, match=r"'teacher', a float copy of 'net'.*float_parameters\(net\)"):
        trainer = make_trainer(callbacks=[QuantRetrainCallback()], log_every_n_steps=1)
        trainer.fit(MadeLater(lambda m: m.parameters(), epoch), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*float copy|.*written between")
        trainer = make_trainer(callbacks=[QuantRetrainCallback()], log_every_n_steps=1)
        trainer.fit(MadeLater(float_parameters, epoch), loader())


def test_a_teacher_that_is_paired_wrongly_is_told(make_trainer: TrainerFactory) -> None:
    with pytest.warns(UserWarning, match=r"'teacher', a float copy of 'net'.*float_parameters\(net\)"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Broadcasts(lambda m: m.parameters()), loader())


@pytest.mark.parametrize("rate", [1e-3, 0.5])
def test_a_teacher_that_is_paired_rightly_is_an_average_and_nobody_is_warned(
    make_trainer: TrainerFactory, rate: float
) -> None:
    class Steps(WithTeacher):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), lr=rate)

    model = Steps(float_parameters)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*float copy|.*written between")
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert model.teacher[4].weight.shape == model.net[4].weight.shape
    assert all(torch.isfinite(parameter).all() for parameter in model.teacher.parameters())


def test_a_frozen_teacher_for_distillation_is_no_reason_to_warn(make_trainer: TrainerFactory) -> None:
    model = WithTeacher(lambda _: [])
    before = {name: parameter.clone() for name, parameter in model.teacher.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*float copy|.*written between")
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.teacher.named_parameters())


@pytest.mark.parametrize("batch_num", [1, 3])
def test_clips_that_are_clamped_like_weights_are_told(make_trainer: TrainerFactory, batch_num: int) -> None:
    class Critic(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            for parameter in self.parameters():
                parameter.data.clamp_(-0.05, 0.05)

    callback = QuantRetrainCallback({"batch_num": batch_num})
    with pytest.warns(UserWarning, match=r"'net.0', 'net.4' were written between two batches.*float_parameters"):
        make_trainer(callbacks=[callback], log_every_n_steps=2).fit(Critic(), loader())


def test_clamping_the_weights_only_leaves_the_clips_alone(make_trainer: TrainerFactory) -> None:
    class Critic(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            for parameter in float_parameters(self):
                parameter.data.clamp_(-0.05, 0.05)

    model = Critic()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*written between")
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert model.net[0].input_quantizer.clip_max > 1
    assert model.net[0].weight.abs().max() <= 0.05


class Averaging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.net)


@pytest.mark.parametrize("submodule", [None, "net"])
@pytest.mark.parametrize("batch_num", [1, 3])
def test_torch_s_averages_of_a_quantized_part_are_quantized_and_no_part_of_the_record(
    make_trainer: TrainerFactory, tmp_path: Path, submodule: str | None, batch_num: int
) -> None:
    model = Averaging()
    callback = QuantRetrainCallback({"batch_num": batch_num}, submodule=submodule)
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(model, loader())
    assert [name.removeprefix("net.") for name in QuantRecord.load(tmp_path / "record.txt")] == ["0", "4"]
    averaged, trained = model.average.module[4].input_quantizer, model.net[4].input_quantizer
    assert averaged.clip_max.item() == pytest.approx(trained.clip_max.item(), rel=0.05)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Averaging(), tmp_path / "last.ckpt")
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(loaded.eval().average(x), model.eval().average(x))
    assert len(quantized_layers(model)) == 2
