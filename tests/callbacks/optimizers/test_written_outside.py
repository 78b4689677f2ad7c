"""Frozen factors stay as they are when a loop, and not only an optimizer's step, writes parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRetrainCallback
from amct_lightning.modules import quantized_layers
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.schedule.test_freezing import factors

ULQ = {"weights": {"algo": "ulq_retrain"}}
FREEZE = {"freeze_data": 1, "freeze_weights": 1, "freeze_bn": 1}


class Sam(torch.optim.SGD):
    """Sharpness-aware minimization, in two steps of its own, neither of which is ``step``."""

    @torch.no_grad()
    def first(self) -> None:
        found = [p for group in self.param_groups for p in group["params"]]
        self.moved = [(p, 0.05 * p.grad + 1e-3) for p in found if p.grad is not None]
        for parameter, difference in self.moved:
            parameter.data.add_(difference)
        self.zero_grad()

    @torch.no_grad()
    def second(self, lr: float = 0.05) -> None:
        for parameter, difference in self.moved:
            parameter.sub_(difference)
            parameter.data.sub_(lr * (parameter.grad + 0.1 * parameter))
        self.zero_grad()


class Sharp(Net):
    """In manual optimization; a second network has norms and layers that are used after the first step only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return Sam(self.parameters(), lr=0.05)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for step in (optimizer.first, optimizer.second):
            self.manual_backward(super().training_step(batch, batch_idx))
            step()


class RawBackward(Sharp):
    """Calls ``backward`` itself, which Lightning does not see."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Decaying(Net):
    """Writes all parameters in a hook at the end of each batch, as a clamping of weights does."""

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(0.99)


class SharpStep(Net):
    """In automatic optimization, with an optimizer that calls its closure twice and needs no gradient to write."""

    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.05)


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1.01)
        closure()
        super().step()
        return loss


class Forwards(pl.Callback):
    """Notes the factors that each forward of a frozen epoch works with, and those at the beginnings of batches."""

    def __init__(self) -> None:
        self.used: list[dict[str, Tensor]] = []
        self.kept: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[-1].register_forward_hook(lambda *_: self.used.append(self._read(pl_module)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch >= 1:
            self.kept.append(factors(pl_module))

    def _read(self, model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in quantized_layers(model).items():
            upper, lower = layer.input_quantizer.usable_clips()
            found |= {f"{name}.upper": upper, f"{name}.lower": lower, f"{name}.scale": layer.weight_quantizer.scale}
        norm = model.get_submodule("net.1")
        found |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
        return {name: value.detach().clone() for name, value in found.items()}


def same(states: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(state[name], first) for state in states for name, first in states[0].items())


@pytest.mark.parametrize("kind", [Sharp, RawBackward, Decaying, SharpStep])
def test_factors_are_frozen_whatever_writes_them(make_trainer: TrainerFactory, kind: Callable[[], Any]) -> None:
    model, notes = kind(), Forwards()
    weight = model.net[4].weight.detach().clone()
    make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE), notes], max_epochs=4).fit(model, loader())
    assert len(notes.kept) == 3 * BATCHES
    assert same([*notes.kept, factors(model)])
    assert not torch.equal(weight, model.net[4].weight)


@pytest.mark.parametrize("kind", [Sharp, SharpStep])
def test_each_forward_of_a_batch_works_with_the_frozen_factors(
    make_trainer: TrainerFactory, kind: Callable[[], Any]
) -> None:
    model, notes = kind(), Forwards()
    make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE), notes], max_epochs=4).fit(model, loader())
    assert len(notes.used) == 2 * 3 * BATCHES
    assert same(notes.used)


def test_a_loop_of_its_own_takes_no_gradients_of_frozen_factors_into_its_norm(make_trainer: TrainerFactory) -> None:
    norms: list[bool] = []

    class Normed(Sharp):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            gradients = [self.net[4].input_quantizer.clip_max.grad, self.net[1].weight.grad]
            norms.append(any(bool(g.any()) for g in gradients))
            self.optimizers().zero_grad()

    make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE)]).fit(Normed(), loader())
    assert norms == [True] * BATCHES + [False] * BATCHES


def test_two_forwards_before_one_backward_are_not_disturbed(make_trainer: TrainerFactory) -> None:
    """Values are put back past autograd, so what a forward has kept for its backward pass counts as unchanged."""

    class Pairs(Sharp):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first = Net.training_step(self, batch, batch_idx)
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            self.manual_backward(first + Net.training_step(self, batch, batch_idx))
            self.optimizers().step()

    model = Pairs()
    notes = Forwards()
    make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE), notes], max_epochs=3).fit(model, loader())
    assert same([*notes.kept, factors(model)])


def test_copies_of_the_model_are_not_held(make_trainer: TrainerFactory) -> None:
    copies: list[Any] = []

    class Copying(Sharp):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if self.current_epoch == 1 and not copies:
                copies.extend([copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))])
                for twin in copies:
                    twin[1].weight.data.fill_(7.0)
                    twin(batch[0])

    make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE)]).fit(Copying(), loader())
    assert len(copies) == 2
    assert all(bool((twin[1].weight == 7).all()) for twin in copies)


def test_what_is_frozen_is_right_in_evaluations_and_checkpoints(make_trainer: TrainerFactory) -> None:
    seen: list[dict[str, Tensor]] = []

    class Saving(Decaying):
        def on_validation_epoch_start(self) -> None:
            if self.current_epoch >= 1:
                seen.append(factors(self))

        def on_train_epoch_end(self) -> None:
            for parameter in self.parameters():
                parameter.data.mul_(0.99)
            if self.current_epoch >= 1:
                self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/{self.current_epoch}.ckpt")

    model, notes = Saving(), Forwards()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(ULQ, schedule=FREEZE), notes], max_epochs=4)
    trainer.fit(model, loader(), loader(1))
    assert same([*notes.kept, *seen])
    for epoch in (1, 2, 3):
        state = torch.load(f"{trainer.default_root_dir}/{epoch}.ckpt", weights_only=False)["state_dict"]
        kept = {name: value for name, value in notes.kept[0].items() if name in state}
        assert len(kept) == 11
        assert all(torch.equal(state[name], value) for name, value in kept.items())
