"""What is refused, by whom, and with which remedy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import Net, TrainerFactory, loader
from tests.callbacks.distill.modules import Taught, distilling


def fit(make_trainer: TrainerFactory, model: pl.LightningModule, /, **settings: Any) -> None:
    make_trainer(callbacks=[distilling(**settings)], max_epochs=1).fit(model, loader())


def test_manual_optimization_has_no_loss_to_add_to(make_trainer: TrainerFactory) -> None:
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"Net optimizes by hand .* docs/distillation.md"):
        fit(make_trainer, module)
    assert type(module.net[0]) is nn.Conv2d  # before it was converted


def test_a_pattern_that_fits_nothing_is_told_with_near_names(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"pattern 'nett.0' fits no layer of Net. Did you mean 'net.0' or .*'net.4'"):
        fit(make_trainer, Net(), layers=["nett.0"])


def test_names_begin_at_the_submodule_as_in_the_record(make_trainer: TrainerFactory) -> None:
    distill = {"layers": ["net.4"]}
    callback = QuantRetrainCallback(submodule="net", distill=distill)
    with pytest.raises(ValueError, match=r"'net.4' fits no layer of Sequential.* '0', '4'"):
        make_trainer(callbacks=[callback]).fit(Net(), loader())


def test_a_module_must_be_there_and_have_something_to_learn(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"Distill\(module='nett'\): Net has no such module. Did you mean 'net'"):
        fit(make_trainer, Net(), module="nett")
    with pytest.raises(ValueError, match=r"Distill\(module='net.2'\): there is no quantized layer in it"):
        fit(make_trainer, Net(), module="net.2")
    with pytest.raises(ValueError, match=r"'net.4' are outside of 'net.0'"):
        fit(make_trainer, Net(), module="net.0", layers=["net.4"])


class InParts(Taught):
    """Two parts, which nothing with a forward holds."""

    forward = pl.LightningModule.forward  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = self.net[:4], self.net[4]
        del self.net

    def call(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_parts_without_a_whole_have_to_be_named(make_trainer: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"no module of InParts with a forward holds all quantized layers .*module='n"):
        fit(make_trainer, InParts())
    fit(make_trainer, InParts(), module="body", output_loss="mse")


def test_a_module_that_is_not_called_is_told_in_the_first_step(make_trainer: TrainerFactory) -> None:
    class PartByPart(Taught):
        def call(self, x: Tensor) -> Tensor:
            return self.net[1:](self.net[0](x))  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match=r"training_step of PartByPart calls none of 'PartByPart', 'net' with grad"):
        fit(make_trainer, PartByPart())


def test_a_part_that_is_checkpointed_with_reentry_has_no_gradients(make_trainer: TrainerFactory) -> None:
    class Reenters(Taught):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=True)  # type: ignore[assignment]
            return self.net[3:](x)  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match=r"output of 'net.0' has no gradient although .*reentrant=False"):
        fit(make_trainer, Reenters(), layers=["net.0"])


def test_layers_that_are_called_otherwise_than_in_the_teacher(make_trainer: TrainerFactory) -> None:
    class Repeats(Taught):
        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            return out + self.net(x) if self.training else out  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match=r"'net.4' was called 2 times by the student and 1 times by the teacher"):
        make_trainer(
            callbacks=[QuantRetrainCallback(allow_reuse=True, distill={"layers": ["net.4"]})], max_epochs=1
        ).fit(Repeats(), loader())


def test_layers_that_nobody_calls_are_told_once(make_trainer: TrainerFactory) -> None:
    class Indirect(Taught):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.net(x), self.last.weight)

    with pytest.warns(UserWarning, match=r"'last' were not called in the first step"):
        fit(make_trainer, Indirect(), layers=["last", "net.0"])


def test_outputs_that_cannot_be_told_or_differ(make_trainer: TrainerFactory) -> None:
    class Pair(Taught):
        def forward(self, x: Tensor) -> Any:
            out = self.net(x)
            return {"scores": out, "other": out if self.training else out[:1]}

        def call(self, x: Tensor) -> Tensor:
            return self(x)["scores"]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"output of Pair has 2 tensors \(it is 'scores', 'other'\).*output=\.\.\."):
        fit(make_trainer, Pair())
    with pytest.raises(ValueError, match=r"has no tensor 'score'"):
        fit(make_trainer, Pair(), output="score")
    with pytest.raises(RuntimeError, match=r"has the shape \(8, 3\), that of its teacher, .*mode, \(1, 3\)"):
        fit(make_trainer, Pair(), output="other")
    fit(make_trainer, Pair(), output="scores")


def test_a_teacher_that_is_to_be_trained_first_is_told(make_trainer: TrainerFactory) -> None:
    callback = QuantRetrainCallback(schedule={"start": 1}, distill={})
    with pytest.warns(UserWarning, match=r"run in float until epoch 1, and the teacher has the weights that"):
        make_trainer(callbacks=[callback]).fit(Net(), loader())
