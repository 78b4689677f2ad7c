"""Only the forwards of a training step calibrate and move ranges, whatever mode the modules are in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import QuantRecord, QuantRetrainCallback, calibrate
from amct_lightning.modules import activation_quantizers
from tests.callbacks.conftest import Net, TrainerFactory, loader

FAR = 100
"""What evaluation is given is so much larger that a range that has seen it would show it."""


class FarEvaluation(Net):
    """Looks at large values in one of its hooks, all modules in training mode."""

    hook = ""

    def look(self, *_: Any, **__: Any) -> None:
        was = self.training
        self.train()
        with torch.no_grad():
            self.net(FAR * torch.ones(4, 2, 4, 4))
        self.train(was)

    def on_validation_model_eval(self) -> None:
        """Leave the modules in training mode."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.train()
        self.net(FAR * batch[0])

    test_step = validation_step  # type: ignore[assignment]


OUTSIDE = [
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
]


@pytest.mark.filterwarnings("ignore:The model is evaluated before")
@pytest.mark.parametrize("hook", OUTSIDE)
@pytest.mark.parametrize("batch_num", [1, 6])
def test_no_hook_outside_of_a_training_step_moves_a_range(
    make_trainer: TrainerFactory, hook: str, batch_num: int
) -> None:
    def train(kind: type[Net]) -> Net:
        model = kind()
        callback = QuantRetrainCallback({"batch_num": batch_num})
        trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=1, val_check_interval=2)
        trainer.fit(model, loader(), loader(1))
        return model

    looks = type("Looks", (FarEvaluation,), {hook: FarEvaluation.look})
    quiet = type("Quiet", (FarEvaluation,), {"validation_step": lambda self, batch, batch_idx: None})
    ranges, expected = (activation_quantizers(train(kind)) for kind in (looks, quiet))
    for name, quantizer in ranges.items():
        assert quantizer.has_range
        if name == "net.0":  # in front of the batch normalization, whose statistics the user's evaluation does move
            assert torch.equal(quantizer.clip_max, expected[name].clip_max)
        assert quantizer.clip_max < FAR / 4


@pytest.mark.parametrize("part", ["net", "net.0"])
def test_a_backbone_in_eval_mode_inside_the_step_calibrates(
    make_trainer: TrainerFactory, tmp_path: Any, part: str
) -> None:
    class Frozen(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.get_submodule(part).eval()
            return super().training_step(batch, batch_idx)

    make_trainer(callbacks=[QuantRetrainCallback()]).fit(Frozen(), loader())
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4"]


def test_a_look_at_predictions_inside_the_step_does_not_calibrate(make_trainer: TrainerFactory) -> None:
    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.eval()
            with torch.no_grad():
                self(FAR * batch[0])
            self.train()
            return super().training_step(batch, batch_idx)

    models = [Looks(), Net()]
    for model in models:
        make_trainer(callbacks=[QuantRetrainCallback({"batch_num": 3})]).fit(model, loader())
    ours, expected = map(activation_quantizers, models)
    assert [q.clip_max.item() for q in ours.values()] == [q.clip_max.item() for q in expected.values()]


def test_frozen_statistics_survive_eval_and_train_inside_the_step(make_trainer: TrainerFactory) -> None:
    class Toggles(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.eval()
            self.train()
            self.net.train()
            self.net[1].train()
            return super().training_step(batch, batch_idx)

    model = Toggles()
    make_trainer(callbacks=[QuantRetrainCallback(schedule={"freeze_bn": 0})]).fit(model, loader())
    assert torch.equal(model.net[1].running_mean, torch.zeros(4))
    assert model.net[1].training  # released when the training ended
    assert "train" not in vars(model.net[1])
    model(torch.randn(8, 2, 4, 4))
    assert not torch.equal(model.net[1].running_mean, torch.zeros(4))


class Student(Net):
    """A student beside a copy of its quantized self."""

    def __init__(self, when: str, mode: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.when, self.mode = when, mode
        self.teacher: nn.Module | None = None

    def on_fit_start(self) -> None:
        if self.when == "before":
            self.teacher = self.mode(copy.deepcopy(self.net))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.when == "during" and self.teacher is None and batch_idx == 2:
            self.teacher = self.mode(copy.deepcopy(self.net))
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(FAR * batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.teacher is not None:
            self.teacher.train()(FAR * batch[0])
            self.mode(self.teacher)


@pytest.mark.filterwarnings("ignore:The model is evaluated before")
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_teacher_in_eval_mode_never_calibrates_and_the_student_has_its_record(
    make_trainer: TrainerFactory, tmp_path: Any, when: str
) -> None:
    model = Student(when, lambda module: module.eval().requires_grad_(False))
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader(), loader(1))
    assert list(QuantRecord.load(tmp_path / "record.txt")) == ["net.0", "net.4"]
    assert model.teacher is not None
    for quantizer in activation_quantizers(model.teacher).values():
        assert quantizer.clip_max < FAR / 4
        assert quantizer.calibrating is (when == "before")


def test_a_copy_from_before_the_calibration_says_that_it_runs_in_float(make_trainer: TrainerFactory) -> None:
    with pytest.warns(UserWarning, match="evaluated before its activation quantizers are calibrated"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(Student("before", lambda module: module.eval()), loader())


def test_a_copy_that_is_given_the_state_evaluates_quantized(make_trainer: TrainerFactory) -> None:
    model = Net()
    twin: list[nn.Module] = []

    class Copies(Net):
        def on_fit_start(self) -> None:
            twin.append(copy.deepcopy(self.net).eval())

    model = Copies()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    for name, tensor in model.net.state_dict(keep_vars=True).items():  # by hand, past load_state_dict
        twin[0].state_dict(keep_vars=True)[name].data.copy_(tensor.data)
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(twin[0](x), model.net.eval()(x))


def test_two_forwards_of_a_step_are_one_batch(make_trainer: TrainerFactory) -> None:
    """As contrastive learning makes them, on two views of an image."""
    states: list[bool] = []

    class TwoViews(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            states.append(self.net[0].input_quantizer.calibrating)
            self(batch[0] + 1)
            return super().training_step(batch, batch_idx)

    make_trainer(callbacks=[QuantRetrainCallback({"batch_num": 3})], max_epochs=1).fit(TwoViews(), loader())
    assert states == [True, True, True, False]


def test_a_layer_that_is_called_several_times_calibrates_on_batch_num_batches(make_trainer: TrainerFactory) -> None:
    states: list[bool] = []

    class Reused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x.flip(-1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            states.append(self.net[0].input_quantizer.calibrating)
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            states.append(self.net[0].input_quantizer.calibrating)
            return loss

    callback = QuantRetrainCallback({"batch_num": 2}, allow_reuse=True)
    make_trainer(callbacks=[callback], max_epochs=1).fit(Reused(), loader())
    assert states == [True, True, True, False, False, False, False, False]


def test_a_layer_that_is_called_less_often_than_expected_is_calibrated_when_the_batch_ends(
    make_trainer: TrainerFactory,
) -> None:
    class Fewer(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + (0 if self.training and self._trainer.global_step else self.net(x.flip(-1)))

    model = Fewer()
    callback = QuantRetrainCallback({"batch_num": 2}, allow_reuse=True)
    make_trainer(callbacks=[callback], max_epochs=1, limit_train_batches=2).fit(model, loader())
    assert all(quantizer.has_range for quantizer in activation_quantizers(model).values())


def test_after_the_training_plain_loops_go_by_the_mode_of_the_module_again(make_trainer: TrainerFactory) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    quantizer = model.net[0].input_quantizer
    quantizer.recalibrate()
    model.train()(torch.full((4, 2, 4, 4), 7.0))
    assert quantizer.clip_max.item() == pytest.approx(7, rel=0.2)


def test_calibrate_works_in_a_hook(make_trainer: TrainerFactory) -> None:
    class Calibrates(Net):
        def on_fit_start(self) -> None:
            calibrate(self, [torch.full((4, 2, 4, 4), 7.0)])

    model = Calibrates()
    make_trainer(callbacks=[QuantRetrainCallback()], max_steps=1, max_epochs=-1).fit(model, loader())
    assert model.net[0].input_quantizer.clip_max.item() == pytest.approx(7, rel=0.2)
