"""Modules that are taught, a teacher made by hand, and what a step is to give according to it."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import Net

T = 3.0


class Taught(Net):
    """Keeps what each step has seen and given; as a subclass says, it is called in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.given: list[Tensor] = []
        self.task_losses: list[Tensor] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.call(x)
        self.seen.append(x)
        self.given.append(out)
        loss = functional.cross_entropy(out, y)
        self.task_losses.append(loss.detach())
        return self.result(loss)

    def call(self, x: Tensor) -> Tensor:
        return self(x)

    def result(self, loss: Tensor) -> Any:
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())


class CallsThePart(Taught):
    def call(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class GivesADict(Taught):
    def result(self, loss: Tensor) -> Any:
        return {"loss": loss, "other": torch.ones(1)}


class Keep(pl.Callback):
    """Keeps the metric of each step, and what the step gave to callbacks."""

    def __init__(self) -> None:
        self.metrics: list[Tensor] = []
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)
        if "distill_loss" in trainer.logged_metrics:
            self.metrics.append(trainer.logged_metrics["distill_loss"])


def float_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval().requires_grad_(False)


def by_hand(student: Tensor, teacher: Tensor, temperature: float = T) -> Tensor:
    """The loss of Hinton et al. (2015), as torch has it."""
    learned = functional.log_softmax(student.double() / temperature, dim=1)
    taught = functional.softmax(teacher.double() / temperature, dim=1)
    return functional.kl_div(learned, taught, reduction="batchmean") * temperature**2


def distilling(**settings: Any) -> QuantRetrainCallback:
    return QuantRetrainCallback(distill={"temperature": T, "weight": 0.5, **settings})
