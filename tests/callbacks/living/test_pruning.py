"""Beside ModelPruning: zeros stay zeros in the quantized layers, and factors are those of the pruned weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint, quantized_layers
from amct_lightning.quantizers import ChannelLayout
from amct_lightning.quantizers.functions.weight import arq_scale
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader

ULQ = {"weights": {"algo": "ulq_retrain"}}
DUE = {"start": 1, "freeze_data": 2, "freeze_weights": 2, "freeze_bn": 2}


class Trained(pl.Callback):
    """Notes the quantized weight of ``net.4`` in each step, and, after it, its scale and the pruned weight."""

    def __init__(self) -> None:
        self.zeros: list[int] = []
        self.scales: list[Tensor] = []
        self.pruned: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.net[4].weight_quantizer.register_forward_hook(self.look)

    def look(self, module: Any, args: Any, output: Tensor) -> None:
        self.zeros.append(int((output == 0).sum()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        layer = pl_module.net[4]
        self.scales.append(layer.weight_quantizer.scale.detach().clone())
        self.pruned.append((layer.weight_orig * layer.weight_mask).detach() if hasattr(layer, "weight_orig") else None)


def scale_of(weight: Tensor, channel_wise: bool = False) -> Tensor:
    return arq_scale(weight.detach(), ChannelLayout(), 8, channel_wise).flatten()


def prune(amount: float = 0.5, **settings: Any) -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=amount, **settings)


def every_epoch(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False)


@pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
@pytest.mark.parametrize("schedule", [None, DUE], ids=["no schedule", "schedule"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_the_records_are_those_of_the_pruned_weights(
    make_trainer: TrainerFactory, tmp_path: Path, first: bool, schedule: Any, config: Any
) -> None:
    """In the middle of an epoch too, when ``layer.weight`` is that of before the last step."""
    model, record = Net(), tmp_path / "r.txt"
    callback = QuantRetrainCallback(config, record, schedule=schedule)
    checkpoints = [
        every_epoch(tmp_path),
        ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=3, save_top_k=-1),
    ]
    callbacks = [callback, prune()] if first else [prune(), callback]
    make_trainer(callbacks=[*callbacks, *checkpoints], max_epochs=4, enable_checkpointing=True).fit(model, loader())
    for layer in quantized_layers(model).values():
        assert (layer.weight == 0).float().mean() >= 0.5
        assert isinstance(layer.weight, torch.nn.Parameter)
    assert QuantRecord.load(record) == QuantRecord.from_model(model)
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert len(paths) == 10
    for path in paths:
        loaded = load_qat_checkpoint(Net(), path)
        if loaded.net[0].input_quantizer.has_range:
            expected = QuantRecord.load(path.with_name(path.name.replace(".ckpt", ".record.txt")))
            assert QuantRecord.from_model(loaded) == expected


def test_the_layers_compute_with_zeros_while_they_are_trained(make_trainer: TrainerFactory) -> None:
    notes, model = Trained(), Net()
    before = [p.clone() for p in model.parameters()]
    make_trainer(callbacks=[QuantRetrainCallback(), prune(), notes], max_epochs=3).fit(model, loader())
    assert min(notes.zeros[-BATCHES:]) >= model.net[4].weight.numel() // 2
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))


def test_scales_are_frozen_at_those_of_the_pruned_weight(make_trainer: TrainerFactory) -> None:
    """``layer.weight`` is that of before the last step when the schedule freezes its scales."""
    notes, model = Trained(), Net()
    callbacks = [QuantRetrainCallback(schedule={"freeze_weights": 2}), prune(), notes]
    make_trainer(callbacks=callbacks, max_epochs=4).fit(model, loader())
    frozen = notes.scales[2 * BATCHES]
    assert torch.equal(frozen, scale_of(notes.pruned[2 * BATCHES - 1]))
    assert all(torch.equal(frozen, scale) for scale in notes.scales[2 * BATCHES :])


def test_scales_updated_now_and_then_follow_the_pruned_weight(make_trainer: TrainerFactory) -> None:
    notes, model = Trained(), Net()
    callbacks = [QuantRetrainCallback(schedule={"update_every_n_steps": 3}), prune(), notes]
    make_trainer(callbacks=callbacks, max_epochs=4).fit(model, loader())
    for step in range(6, 4 * BATCHES, 3):  # pruned for the first time after step 4
        assert torch.equal(notes.scales[step], scale_of(notes.pruned[step]))


@pytest.mark.parametrize("permanent", [True, False])
def test_pruning_of_a_batch_norm_is_folded_into_the_record(
    make_trainer: TrainerFactory, tmp_path: Path, permanent: bool
) -> None:
    model, record = Net(), tmp_path / "r.txt"
    pruning = prune(
        parameters_to_prune=[(model.net[1], "weight")],
        make_pruning_permanent=permanent,
        apply_pruning=lambda epoch: epoch == 0,
    )
    make_trainer(callbacks=[QuantRetrainCallback(record_file=record), pruning], max_epochs=3).fit(model, loader())
    norm = model.net[1]
    if not permanent:
        assert not torch.equal(norm.weight, norm.weight_orig * norm.weight_mask)  # as computed before the last step
        norm.weight = norm.weight_orig * norm.weight_mask
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    expected = (scale_of(model.net[0].weight, True) * factor.detach()).abs()
    assert QuantRecord.load(record)["net.0"].scale_w == pytest.approx([float(x) or 1.0 for x in expected])


def test_lottery_tickets(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """The surviving weights go back to their first values, which a learned scale does not follow at once."""
    model, record = Net(), tmp_path / "r.txt"
    callbacks = [
        QuantRetrainCallback(ULQ, record, schedule=DUE),
        prune(lambda epoch: 0.5 if epoch < 2 else 0, use_lottery_ticket_hypothesis=True),
    ]
    make_trainer(callbacks=callbacks, max_epochs=4).fit(model, loader())
    assert QuantRecord.load(record) == QuantRecord.from_model(model)
    assert (model.net[4].weight == 0).float().mean() >= 0.5


def test_a_run_goes_on_from_its_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """Lightning keeps no masks in checkpoints; it prunes anew at the end of the epoch."""

    def run(resume: Path | None = None, **settings: Any) -> Net:
        model = Net()
        pruning = prune(parameters_to_prune=[(model.net[0], "weight"), (model.net[4], "weight")])
        callbacks = [QuantRetrainCallback(record_file=tmp_path / "r.txt", **settings), pruning, every_epoch(tmp_path)]
        trainer = make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, loader(), ckpt_path=resume)
        return model

    run(schedule=DUE)
    expected = QuantRecord.load(tmp_path / "epoch=2.record.txt")
    model = run(tmp_path / "epoch=2.ckpt", schedule=DUE)
    assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model) == expected  # all of it is frozen
    assert (model.net[4].weight == 0).float().mean() >= 0.5


def test_a_model_pruned_before_says_how_to_get_its_layers_quantized(make_trainer: TrainerFactory) -> None:
    model = Net()
    torch.nn.utils.prune.l1_unstructured(model.net[4], "weight", 0.5)
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(model, loader())
    assert list(quantized_layers(model)) == ["net.0"]
