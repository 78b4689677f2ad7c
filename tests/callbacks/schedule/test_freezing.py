"""Frozen means bit-identical, whatever the optimizer, the precision and the loop do; the neighbours go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import QuantRetrainCallback, QuantSchedule, quantized_layers
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader

FROM, STEPS = 4, 200
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2),
}


class Frozen(Net):
    """``net.0`` is to be frozen, ``net.4`` not; ULQ weights have scales that are learned."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.kind = optimizer

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self.parameters())


class Manual(Frozen):
    """Two optimizers, one of which is used without Lightning's wrapper, so that its hooks do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [OPTIMIZERS["sgd"](self.net[0].parameters()), OPTIMIZERS["adamw"](self.net[1:].parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raw = self.optimizers(use_pl_optimizer=False)[0]
        wrapped = self.optimizers()[1]
        for optimizer in (raw, wrapped):
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        raw.step()
        wrapped.step()


class Half(Frozen):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x.to(self.net[0].weight.dtype)), y)


class Watch(pl.Callback):
    """Notes the factors after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append(factors(pl_module))


def factors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in quantized_layers(model).items():
        for quantizer in ("input_quantizer", "weight_quantizer"):
            for factor in ("clip_max", "clip_min", "scale"):
                if hasattr(getattr(layer, quantizer), factor):
                    found[f"{name}.{quantizer}.{factor}"] = getattr(getattr(layer, quantizer), factor).detach().clone()
    norm = model.get_submodule("net.1")
    return found | {f"net.1.{name}": value.clone() for name, value in norm.state_dict().items()}


def epochs(batches_per_step: int = 1) -> int:
    return FROM + STEPS * batches_per_step // BATCHES


def check(seen: list[dict[str, Tensor]], batches_per_step: int = 1) -> None:
    """Compare all states after the freeze with the first of them, and find every factor of the neighbour moved."""
    after = seen[FROM * BATCHES :]
    assert len(after) == STEPS * batches_per_step
    for name, first in after[0].items():
        same = all(torch.equal(first, state[name]) for state in after)
        assert same == (not name.startswith("net.4")), name


def schedule() -> QuantSchedule:
    return QuantSchedule(
        freeze_data=FROM,
        freeze_weights=FROM,
        freeze_bn=FROM,
        layers={"net.4": {"freeze_data": None, "freeze_weights": None}},
    )


CASES = [
    pytest.param("sgd", {}, id="sgd"),
    pytest.param("adamw", {}, id="adamw"),
    pytest.param("fused", {}, id="fused"),
    pytest.param("lbfgs", {}, id="lbfgs"),
    pytest.param("adamw", {"accumulate_grad_batches": 4}, id="accumulation"),
    pytest.param("sgd", {"gradient_clip_val": 0.1}, id="clipping"),
    pytest.param("adamw", {"precision": "bf16-mixed"}, id="bf16-mixed"),
    pytest.param("adamw", {"precision": "64-true"}, id="64-true"),
    pytest.param("adamw", {"precision": "bf16-true"}, id="bf16-true"),
]


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize(("optimizer", "settings"), CASES)
def test_frozen_factors_stay_bit_identical(
    make_trainer: TrainerFactory, optimizer: str, settings: dict[str, Any], algo: str
) -> None:
    watch = Watch()
    config = {"weights": {"algo": algo}, "activations": {"fixed_min": "after_relu"}}  # so that both ends are learned
    callback = QuantRetrainCallback(config, quant_weight_decay=None, schedule=schedule())
    each = settings.get("accumulate_grad_batches", 1)
    make_trainer(max_epochs=epochs(each), callbacks=[callback, watch], **settings).fit(Half(optimizer), loader())
    check(watch.seen, each)


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
def test_with_a_gradient_scaler_that_skips_steps(make_trainer: TrainerFactory, algo: str) -> None:
    watch = Watch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)  # overflows now and then
    trainer = make_trainer(
        max_epochs=epochs(),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[QuantRetrainCallback({"weights": {"algo": algo}}, schedule=schedule()), watch],
    )
    trainer.fit(Frozen("sgd"), loader())
    check(watch.seen)


@pytest.mark.usefixtures("every_execution")
def test_in_manual_optimization_also_of_a_raw_optimizer(make_trainer: TrainerFactory) -> None:
    watch = Watch()
    callback = QuantRetrainCallback({"weights": {"algo": "ulq_retrain"}}, schedule=schedule())
    make_trainer(max_epochs=epochs(), callbacks=[callback, watch]).fit(Manual(), loader())
    check(watch.seen)
