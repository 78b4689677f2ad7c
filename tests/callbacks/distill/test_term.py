"""What is added to the loss, compared with the loss written by hand."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import TrainerFactory, loader
from tests.callbacks.distill.modules import (
    CallsThePart,
    GivesADict,
    Keep,
    T,
    Taught,
    by_hand,
    distilling,
    float_copy,
)

# A divergence is made of differences of numbers near 1, each rounded in float32, times the temperature squared.
CLOSE = {"rtol": 1e-5, "atol": T**2 * torch.finfo(torch.float32).eps}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **CLOSE)


def fit(make_trainer: TrainerFactory, module: pl.LightningModule, callback: pl.Callback, **kwargs: Any) -> Keep:
    keep = Keep()
    callbacks = [callback, keep, *kwargs.pop("callbacks", [])]
    trainer = make_trainer(callbacks=callbacks, **{"log_every_n_steps": 1, "max_epochs": 1, **kwargs})
    trainer.fit(module, loader())
    return keep


@pytest.mark.parametrize("kind", [Taught, CallsThePart, GivesADict])
def test_the_loss_of_a_step_is_its_own_and_the_divergence_from_the_float_model(
    make_trainer: TrainerFactory, kind: type[Taught]
) -> None:
    module = kind()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(), max_epochs=2)
    assert len(module.seen) == len(keep.metrics) == 8
    for step, x in enumerate(module.seen):
        term = 0.5 * by_hand(module.given[step], teacher(x))
        assert term > 0
        close(keep.metrics[step], term)
        close(module.losses[step], module.task_losses[step] + term)
        close(keep.outputs[step]["loss"], module.losses[step])
    assert kind is not GivesADict or torch.equal(keep.outputs[0]["other"], torch.ones(1))


def test_the_gradients_are_those_of_the_loss_written_by_hand(make_trainer: TrainerFactory) -> None:
    class ByHand(Taught):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self(batch[0])
            wanted = functional.log_softmax(teacher(batch[0]) / T, dim=1)
            own = functional.log_softmax(out / T, dim=1)
            soft = functional.kl_div(own, wanted, log_target=True, reduction="batchmean") * T**2
            return functional.cross_entropy(out, batch[1]) + 0.5 * soft

    class Gradients(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    found: list[list[Tensor]] = []
    teacher = float_copy(Taught().net)
    for module, callback in ((Taught(), distilling()), (ByHand(), QuantRetrainCallback())):
        make_trainer(callbacks=[callback, Gradients()], max_steps=2).fit(module, loader())
    first, second = found[:2], found[2:]
    assert len(first[1]) == len(second[1]) > 8
    for ours, theirs in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_terms_of_several_calls_add_up_and_those_without_gradients_do_not_count(
    make_trainer: TrainerFactory,
) -> None:
    class Twice(Taught):
        def call(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self(x + 1)
            self.other = self.net(-x)
            return self(x)

    module = Twice()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(), limit_train_batches=2)
    x = module.seen[-1]
    close(keep.metrics[-1], 0.5 * (by_hand(module.given[-1], teacher(x)) + by_hand(module.other, teacher(-x))))


def test_layers_are_compared_by_their_mean_squared_error(make_trainer: TrainerFactory) -> None:
    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.net[0].register_forward_hook(lambda *args: hidden.append(args[-1].detach()))

    module, hidden = Taught(), list[Tensor]()
    teacher = float_copy(module.net)
    settings = {"layers": ["net.?"], "layer_weight": 0.25, "output_loss": None}
    keep = fit(make_trainer, module, distilling(**settings), callbacks=[Look()])
    assert len(hidden) == 4
    for step, x in enumerate(module.seen):
        pairs = (hidden[step], teacher[0](x)), (module.given[step], teacher(x))  # type: ignore[index]
        errors = [(own - wanted).double().pow(2).mean() for own, wanted in pairs]
        close(keep.metrics[step], 0.5 * 0.25 * (errors[0] + errors[1]) / 2)


def test_output_and_layers_together(make_trainer: TrainerFactory) -> None:
    module = Taught()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(layers=["net.4"], output_loss="mse"))
    error = (module.given[-1] - teacher(module.seen[-1])).double().pow(2).mean()
    close(keep.metrics[-1], 0.5 * (error + error))  # the last layer is the output


def test_other_modules_are_compared_if_a_pattern_is_for_no_quantized_layer(make_trainer: TrainerFactory) -> None:
    module = Taught()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(layers=["net"], output_loss=None))
    error = (module.given[-1] - teacher(module.seen[-1])).double().pow(2).mean()
    close(keep.metrics[-1], 0.5 * error)


def test_the_share_of_the_own_loss(make_trainer: TrainerFactory) -> None:
    module = Taught()
    keep = fit(make_trainer, module, distilling(task_weight=0))
    for loss, metric in zip(module.losses, keep.metrics, strict=True):
        close(loss, metric)


def test_the_weight_follows_its_schedule_within_epochs_and_the_teacher_rests_where_it_is_zero(
    make_trainer: TrainerFactory,
) -> None:
    module = Taught()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(weight=1.0, final_weight=0.0, start=1, end=2), max_epochs=3)
    assert [float(a - b) for a, b in zip(module.losses[:4], module.task_losses[:4], strict=True)] == [0.0] * 4
    for batch, weight in enumerate((1.0, 0.75, 0.5, 0.25)):
        step = 4 + batch
        close(keep.metrics[batch], weight * by_hand(module.given[step], teacher(module.seen[step])))
    assert [float(a - b) for a, b in zip(module.losses[8:], module.task_losses[8:], strict=True)] == [0.0] * 4


def test_with_accumulated_gradients_the_term_is_a_part_of_each_batch(make_trainer: TrainerFactory) -> None:
    module = Taught()
    teacher = float_copy(module.net)
    fit(make_trainer, module, distilling(), accumulate_grad_batches=2)
    for step, x in enumerate(module.seen):
        close(module.losses[step], (module.task_losses[step] + 0.5 * by_hand(module.given[step], teacher(x))) / 2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_other_precisions_the_teacher_computes_as_the_student_does(
    make_trainer: TrainerFactory, precision: Any
) -> None:
    module = Taught()
    teacher = float_copy(module.net)
    keep = fit(make_trainer, module, distilling(), precision=precision)
    x = module.seen[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        wanted = teacher.to(x.dtype)(x)
    close(keep.metrics[-1], 0.5 * by_hand(module.given[-1], wanted))
    assert keep.metrics[-1].dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_a_step_that_is_skipped_stays_so(make_trainer: TrainerFactory) -> None:
    class Skips(Taught):
        def result(self, loss: Tensor) -> Any:
            return None if len(self.seen) == 2 else loss

    module = Skips()
    fit(make_trainer, module, distilling())
    assert len(module.losses) == 3


def test_dropout_and_batch_statistics_are_the_students_alone(make_trainer: TrainerFactory) -> None:
    class Drops(Taught):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(3, nn.Dropout(0.5))

    runs = []
    for callback in (QuantRetrainCallback(), distilling(weight=1e-30)):
        module = Drops()
        pl.seed_everything(1)
        fit(make_trainer, module, callback)
        runs.append(module)
    plain, taught = runs
    assert all(torch.equal(a, b) for a, b in zip(plain.task_losses, taught.task_losses, strict=True))
    assert torch.equal(plain.net[1].running_mean, taught.net[1].running_mean)
