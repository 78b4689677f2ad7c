"""Forwards that run twice, or as a compiled graph: each call counts once, nothing is compiled anew, nothing waits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from tests.callbacks.conftest import Net, TrainerFactory, loader
from tests.callbacks.distill.modules import Taught, distilling
from tests.operators import Operators


class Checkpointed(Taught):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.net[:3], x, use_reentrant=False)  # type: ignore[assignment]
        return self.net[3:](x)  # type: ignore[no-any-return]


class WholeCheckpointed(Taught):
    def call(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Checkpointed, WholeCheckpointed])
def test_what_the_backward_pass_repeats_does_not_count_again(make_trainer: TrainerFactory, kind: type[Taught]) -> None:
    losses = []
    for module in (Taught(), kind()):
        callback = distilling(layers=["net.*"])
        make_trainer(callbacks=[callback], max_epochs=1).fit(module, loader())
        losses.append(module.losses)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


class Compiled(Taught):
    def on_fit_start(self) -> None:
        self.net.compile(backend="aot_eager")

    def call(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def test_a_compiled_module_is_taught_and_compiled_no_more_once_it_is_calibrated(make_trainer: TrainerFactory) -> None:
    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            compiled.append(counters["stats"]["unique_graphs"])

    losses, compiled = [], list[int]()
    for module in (Taught(), Compiled()):
        callbacks = [distilling(layers=["net.0"], weight=1.0, final_weight=0.5), Count()]
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, loader())
        losses.append(module.losses)
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-4)
    assert compiled[8] > 0
    assert len(set(compiled[11:])) == 1


def test_a_module_compiled_as_a_whole_has_a_float_teacher(make_trainer: TrainerFactory) -> None:
    losses = []
    for is_compiled in (False, True):
        module = Net()
        given: Any = torch.compile(module, backend="eager") if is_compiled else module
        metrics: list[float] = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, kept: list[float] = metrics) -> None:
                kept.append(float(trainer.logged_metrics["distill_loss"]))

        make_trainer(callbacks=[distilling(), Keep()], max_epochs=1, log_every_n_steps=1).fit(given, loader())
        losses.append(metrics)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("offload", [False, True])
def test_no_step_waits_for_the_device(make_trainer: TrainerFactory, offload: bool) -> None:
    class Count(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.operators = Operators()
            self.operators.__enter__()

        def on_before_zero_grad(self, *_: Any) -> None:  # the forward is done; what follows is as without a teacher
            self.operators.__exit__(None, None, None)
            counted.append(self.operators)

    counted: list[Operators] = []
    callback = distilling(layers=["net.*"], weight=1.0, final_weight=0.1, offload=offload)
    make_trainer(callbacks=[callback, Count()], max_epochs=2).fit(Net(), loader())
    assert len(counted) == 8
    assert counted[-1].counts["aten::convolution"] == 2  # the student and its teacher
    assert all(operators.host_reads == {} for operators in counted)
