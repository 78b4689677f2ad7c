"""Training the quantization factors alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from amct_lightning import QuantRetrainCallback
from amct_lightning.modules import quantized_layers
from tests.callbacks.conftest import Net, TrainerFactory, loader

CONFIG = {"weights": {"algo": "ulq_retrain", "channel_wise": False}}


def distilling(**kwargs: Any) -> QuantRetrainCallback:
    return QuantRetrainCallback(CONFIG, distill={"factors_only": True, "weight": 1.0}, **kwargs)


def test_factors_learn_and_everything_else_stays_bit_for_bit(make_trainer: TrainerFactory) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            factors.append({name: p.clone() for name, p in pl_module.named_parameters() if "_quantizer" in name})

    factors: list[dict[str, Tensor]] = []
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(callbacks=[distilling(), Look()], max_epochs=2).fit(module, loader())
    after = module.state_dict()
    kept = [name for name in before if "num_batches" not in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    learned = [name for name in factors[-1] if not torch.equal(factors[0][name], factors[-1][name])]
    assert {name.rpartition(".")[0] for name in learned} == {
        f"{name}.{part}_quantizer" for name in quantized_layers(module) for part in ("input", "weight")
    }
    assert all(p.requires_grad for p in module.parameters())  # the module is the user's again


def test_weights_take_no_memory_for_gradients(make_trainer: TrainerFactory) -> None:
    class Look(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.update(name for name, p in pl_module.named_parameters() if p.grad is not None)

    found: set[str] = set()
    make_trainer(callbacks=[distilling(), Look()]).fit(Net(), loader())
    assert found
    assert all("_quantizer" in name for name in found)


def test_a_schedule_of_the_user_counts_for_batch_normalization(make_trainer: TrainerFactory) -> None:
    assert distilling().schedule.freeze_bn == 0  # type: ignore[union-attr]
    assert distilling(schedule={"freeze_data": 1}).schedule.freeze_bn == 0  # type: ignore[union-attr]
    module = Net()
    mean = module.net[1].running_mean.clone()
    make_trainer(callbacks=[distilling(schedule={"freeze_bn": 1})]).fit(module, loader())
    assert not torch.equal(module.net[1].running_mean, mean)


def test_the_module_gets_its_gradients_back_after_an_error(make_trainer: TrainerFactory) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("no")

    module = Fails()
    module.net[4].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(callbacks=[distilling()]).fit(module, loader())
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["net.4.bias"]
