"""The rate of the clips is that of the group they came from, times ``quant_lr_scale``, whoever writes that rate."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler

from amct_lightning import QuantRetrainCallback
from amct_lightning.modules import activation_quantizers, learned_factors
from tests.callbacks.checkpoints.test_resume_phases import assert_same
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader

SCALE = 0.25


class Two(Net):
    """Two groups with rates of their own; ``make`` gives what steps and schedules them."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any] | None = None) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[:2].parameters()}, {"params": self.net[2:].parameters(), "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        if self.make is None:
            return optimizer
        scheduler = self.make(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Warmup(Two):
    """Writes the rates of the groups it made, in the hook that Lightning's documentation shows for it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group, rate in zip(optimizer.param_groups[:2], (0.01, 0.02), strict=True):
            group["lr"] = rate * min(1.0, (self.global_step + 1) / 6)
        optimizer.step(closure=closure)


class EveryGroup(Two):
    """Writes one rate into all the groups there are."""

    def on_train_batch_start(self, *_: Any) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 / (self.global_step + 1)


class Known(lr_scheduler.LRScheduler):
    """A scheduler of the user's with a list for the groups that it was made with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.max_lrs = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [rate / (1 + self.last_epoch) for rate in self.max_lrs]


class Plain:
    """One that is no ``LRScheduler`` and pairs its rates with the groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.values, self.count = optimizer, [0.01, 0.02], 0

    def step(self, *_: Any) -> None:
        self.count += 1
        for group, rate in zip(self.optimizer.param_groups, self.values, strict=False):
            group["lr"] = rate / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class PlainTwo(Two):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Kept(Two):
    """Steps a scheduler that it has not told Lightning of."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.kept = {"main": lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.9**e])}
        return optimizer

    def on_train_batch_end(self, *_: Any) -> None:
        self.kept["main"].step()


MODELS: dict[str, Callable[[], Two]] = {
    "lambdas": lambda: Two(lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.5**e, lambda e: 0.9**e])),
    "multiplicative": lambda: Two(lambda o: lr_scheduler.MultiplicativeLR(o, [lambda e: 0.5, lambda e: 0.9])),
    "onecycle": lambda: Two(lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=12)),
    "cyclic": lambda: Two(
        lambda o: lr_scheduler.CyclicLR(o, [0.001, 0.002], [0.1, 0.2], step_size_up=2, cycle_momentum=False)
    ),
    "cosine": lambda: Two(lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.005)),
    "chained": lambda: Two(
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LambdaLR(o, [lambda e: 0.5**e, lambda e: 0.9**e]), lr_scheduler.ExponentialLR(o, 0.9)]
        )
    ),
    "known groups": lambda: Two(Known),
    "pairs": lambda: PlainTwo(Plain),
    "kept": Kept,
    "warm-up": Warmup,
    "every group": EveryGroup,
}


class Steps(pl.Callback):
    """Notes the rates that each step of the optimizer is made with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def note(optimizer: Any, *_: Any) -> None:
            self.seen.append([group["lr"] for group in optimizer.param_groups])

        trainer.optimizers[0].register_step_post_hook(note)


@pytest.mark.parametrize("name", MODELS)
def test_each_step_has_the_rate_of_the_weights_times_the_scale(make_trainer: TrainerFactory, name: str) -> None:
    steps = Steps()
    make_trainer(callbacks=[QuantRetrainCallback(quant_lr_scale=SCALE), steps]).fit(MODELS[name](), loader())
    assert len(steps.seen) == 2 * BATCHES
    assert len({rates[0] for rates in steps.seen}) > 1
    assert all(rates[2:] == [SCALE * rates[0], SCALE * rates[1]] for rates in steps.seen)


def test_the_lowest_rate_of_a_plateau_is_that_of_the_group(make_trainer: TrainerFactory) -> None:
    class Plateau(Two):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.004, 0.001])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    steps = Steps()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(quant_lr_scale=SCALE), steps], max_epochs=6)
    trainer.fit(Plateau(), loader())
    assert steps.seen[-1] == [0.004, 0.001, SCALE * 0.004, SCALE * 0.001]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_to_the_bit(make_trainer: TrainerFactory, tmp_path: Path, name: str) -> None:
    def run(folder: str, **settings: Any) -> Path:
        out = tmp_path / folder
        saving = ModelCheckpoint(out, "{epoch}", save_top_k=-1, save_last=True)
        callback = QuantRetrainCallback(record_file=out / "record.txt", quant_lr_scale=SCALE)
        model = MODELS[name]()
        trainer = make_trainer(callbacks=[callback, saving], max_epochs=3, enable_checkpointing=True)
        if name == "kept":  # the state of such a scheduler is the user's business
            trainer.strategy.connect(model)
            model.on_save_checkpoint = lambda c: c.update(kept=model.kept["main"].state_dict())
            model.on_load_checkpoint = lambda c: setattr(model, "saved", c["kept"])
            model.on_train_start = lambda: hasattr(model, "saved") and model.kept["main"].load_state_dict(model.saved)
        trainer.fit(model, loader(), **settings)
        return out

    assert_same(run("whole"), run("resumed", ckpt_path=run("whole") / "epoch=0.ckpt"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_monitor_shows_it(
    make_trainer: TrainerFactory, tmp_path: Path, name: str, first: bool
) -> None:
    callback, monitor = QuantRetrainCallback(quant_lr_scale=SCALE), LearningRateMonitor("step")
    callbacks = [callback, monitor] if first else [monitor, callback]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(MODELS[name](), loader())
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr-AdamW/pg1"]]
    assert len(rows) == 2 * BATCHES
    for row in rows:
        rates = [float(row[f"lr-AdamW/pg{group}"]) for group in (1, 2, 3, 4)]
        assert rates[2:] == [SCALE * rates[0], SCALE * rates[1]]


class Named(Net):
    """Groups with names, one of which is that which the clips of another would get."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[0].parameters(), "name": "a"},
            {"params": self.net[1].parameters(), "name": "a/quant"},
            {"params": self.net[2:].parameters(), "name": "b"},
        ]
        return torch.optim.AdamW(groups)


def test_groups_with_names_keep_names_of_their_own(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    callbacks = [QuantRetrainCallback(), LearningRateMonitor()]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Named(), loader())
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    assert names == ["a", "a/quant", "b", "a/quant2", "b/quant"]
    assert set(callbacks[1].lrs) == {f"lr-AdamW/{name}" for name in names}


def test_clips_that_join_named_parameters_bring_their_names(make_trainer: TrainerFactory) -> None:
    """An optimizer made from ``named_parameters()`` has one name for each parameter."""

    class Growing(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net[4].named_parameters(prefix="net.4"), lr=0.01)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                named = [(f"net.0.{name}", p) for name, p in self.net[0].named_parameters(recurse=False)]
                self.trainer.optimizers[0].add_param_group({"params": named})

    model = Growing()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=3)
    trainer.fit(model, loader())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = trainer.optimizers[0].param_groups
    for group in groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    trained = {id(p) for group in groups for p in group["params"]}
    assert {id(p) for p in learned_factors(model)} <= trained


def test_a_rate_in_a_tensor_is_changed_in_place(make_trainer: TrainerFactory) -> None:
    class Tensors(Warmup):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.net[:2].parameters(), "lr": torch.tensor(0.01)},
                {"params": self.net[2:].parameters(), "lr": torch.tensor(0.02)},
            ]
            return torch.optim.AdamW(groups, weight_decay=0.1, foreach=False, capturable=False)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            for group in optimizer.param_groups[:2]:
                group["lr"].mul_(0.9)
            optimizer.step(closure=closure)

    trainer = make_trainer(callbacks=[QuantRetrainCallback(quant_lr_scale=SCALE)])
    trainer.fit(Tensors(), loader())
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    assert rates[2:] == [SCALE * rates[0], SCALE * rates[1]]


class MatricesOnly(Net):
    """Without biases and norms, a float network has matrices only."""

    def __init__(self) -> None:
        super().__init__()
        linear = torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(8, 3, bias=False)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), linear[0], torch.nn.ReLU(), linear[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Muon(self.parameters(), lr=0.01)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@needs_muon
def test_an_optimizer_for_matrices_is_refused_with_the_remedy(make_trainer: TrainerFactory) -> None:
    make_trainer().fit(MatricesOnly(), loader())
    with pytest.raises(ValueError, match=r"Muon only supports 2D.*p\.ndim == 2\].*another optimizer"):
        make_trainer(callbacks=[QuantRetrainCallback()]).fit(MatricesOnly(), loader())


@needs_muon
def test_beside_an_optimizer_for_matrices_clips_are_trained_by_another(make_trainer: TrainerFactory) -> None:
    class Both(MatricesOnly):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            matrices = [p for p in self.parameters() if p.ndim == 2]
            others = [p for p in self.parameters() if p.ndim != 2]
            return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    model = Both()
    make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=1).fit(model, loader())
    before = [(q.clip_max.item(), q.clip_min.item()) for q in activation_quantizers(model).values()]
    make_trainer(callbacks=[QuantRetrainCallback()], max_epochs=1).fit(model, loader())
    assert before != [(q.clip_max.item(), q.clip_min.item()) for q in activation_quantizers(model).values()]
