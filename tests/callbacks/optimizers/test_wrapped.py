"""Optimizers around optimizers, as they are found: also without ``super().__init__()``."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateMonitor, ModelCheckpoint
from torch import Tensor

from amct_lightning import QuantRetrainCallback
from amct_lightning.modules import learned_factors
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader
from tests.callbacks.living.test_finetuning import Transfer
from tests.callbacks.schedule.test_freezing import factors


class Hooks(torch.optim.Optimizer):
    """What Lightning needs of an optimizer that leaves out ``super().__init__()``: the dicts of the step's hooks."""

    def __new__(cls, *_args: Any) -> Any:
        made = super().__new__(cls)
        made.__dict__.update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
        return made


class Lookahead(Hooks):
    """As timm has it."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = defaultdict(dict)
        for group in base.param_groups:
            group.setdefault("lookahead_step", 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for group in self._base_optimizer.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % 2 == 0:
                for parameter in group["params"]:
                    slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class Bare(Hooks):
    """With a list of its own of the same groups, and no defaults."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.defaults = base, [*base.param_groups], base.state, {}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups = [*self.inner.param_groups]


class Delegating(Bare):
    """Hands ``add_param_group`` on, and asks for the groups each time."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.inner, self.state, self.defaults = base, base.state, {}

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, group: Any) -> None:
        self.inner.add_param_group(group)


class Both(Bare):
    """Two optimizers as one: each has groups of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        weights = [p for p in base.param_groups[0]["params"] if p.ndim > 1]
        others = [p for p in base.param_groups[0]["params"] if p.ndim <= 1]
        self.parts = [torch.optim.SGD(weights, lr=0.1), torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state, self.defaults = {}, {}

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for part in self.parts:
            part.step()
        return loss


WRAPPERS = [Lookahead, Bare, Delegating, Both]


class Wrapped(Net):
    def __init__(self, wrapper: Callable[[torch.optim.Optimizer], Any]) -> None:
        super().__init__()
        self.wrapper = wrapper

    def configure_optimizers(self) -> Any:
        return self.wrapper(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))


class Clips(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(factors(pl_module))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clips_have_their_group_and_are_trained_and_then_frozen(make_trainer: TrainerFactory, wrapper: Any) -> None:
    notes, model = Clips(), Wrapped(wrapper)
    callback = QuantRetrainCallback(quant_lr_scale=0.5, schedule={"freeze_data": 2})
    trainer = make_trainer(callbacks=[callback, notes], max_epochs=4)
    trainer.fit(model, loader())
    optimizer = trainer.optimizers[0]
    clips = (optimizer.parts[-1] if wrapper is Both else optimizer).param_groups[-1]
    assert any(group is clips for group in optimizer.param_groups)
    assert {id(p) for p in clips["params"]} == {id(p) for p in learned_factors(model)}
    assert (clips["lr"], clips["weight_decay"]) == (0.05, 0)
    names = [name for name in notes.seen[0] if "clip_max" in name]
    for name in names:
        values = [state[name].item() for state in notes.seen]
        assert len(set(values[1 : 2 * BATCHES])) > BATCHES
        assert len(set(values[2 * BATCHES :])) == 1


@pytest.mark.parametrize("wrapper", [Lookahead, Bare, Delegating])
def test_schedulers_of_the_inner_optimizer_move_the_clips(make_trainer: TrainerFactory, wrapper: Any) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            base = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)
            wrapped = wrapper(base)
            scheduler = torch.optim.lr_scheduler.LambdaLR(base, [lambda epoch: 0.5**epoch])
            self.kept = scheduler  # stepped by hand: Lightning takes schedulers of the optimizer it was given
            return wrapped

        def on_train_epoch_end(self) -> None:
            self.kept.step()

    trainer = make_trainer(callbacks=[QuantRetrainCallback(quant_lr_scale=0.5)], max_epochs=3)
    trainer.fit(Scheduled(), loader())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1 / 8, 0.1 / 16]


@pytest.mark.parametrize("wrapper", [Bare, Delegating])
def test_a_run_goes_on_to_the_bit(make_trainer: TrainerFactory, tmp_path: Path, wrapper: Any) -> None:
    def run(**settings: Any) -> Any:
        model = Wrapped(wrapper)
        callbacks = [QuantRetrainCallback(quant_lr_scale=0.5), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=4)
        trainer.fit(model, loader(), **settings)
        return model

    whole = run().state_dict()
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_backbone_that_is_thawed_in_a_wrapped_optimizer(make_trainer: TrainerFactory) -> None:
    class Model(Transfer):
        def configure_optimizers(self) -> Any:
            return Delegating(super().configure_optimizers())

    model = Model()
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = make_trainer(callbacks=[QuantRetrainCallback(), tuning, LearningRateMonitor()], logger=True, max_epochs=3)
    trainer.fit(model, loader())
    clips = next(group for group in trainer.optimizers[0].param_groups if group["weight_decay"] == 0)
    assert {id(p) for p in clips["params"]} == {id(p) for p in learned_factors(model)}
