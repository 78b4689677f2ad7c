"""Beside callbacks that freeze a backbone and thaw it later: its clips calibrate, wait, and are then learned."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.modules import activation_quantizers, learned_factors
from tests.callbacks.checkpoints.test_resume_phases import assert_same
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader

THAW, EPOCHS = 2, 5
DUE = {"start": 1, "freeze_data": 4, "freeze_weights": 4, "freeze_bn": 4}
ULQ = {"weights": {"algo": "ulq_retrain"}}


class Transfer(Net):
    """A backbone and a head, each with two layers."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.backbone = nn.Sequential(conv[0], nn.BatchNorm2d(4), nn.Tanh(), conv[1], nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)


class InParts(BaseFinetuning):
    """Thaws one layer after the other."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.backbone[3 if epoch == 1 else 0], optimizer, lr=1e-3)


class Notes(pl.Callback):
    """Notes the groups of the optimizer, by names, and all clips."""

    def __init__(self) -> None:
        self.groups: list[list[dict[str, Any]]] = []
        self.clips: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.groups.append([{**group, "params": {names[id(p)] for p in group["params"]}} for group in groups])
        clips = [(q.clip_max.detach(), q.clip_min.detach()) for q in activation_quantizers(pl_module).values()]
        self.clips.append(torch.tensor(clips))


def backbone(**settings: Any) -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=THAW, lambda_func=lambda _: 1.5, **settings)


def train(make_trainer: TrainerFactory, model: Any, tuning: pl.Callback, first: bool = True, **settings: Any) -> Notes:
    notes = Notes()
    callback = QuantRetrainCallback(**{"quant_lr_scale": 0.5, **settings})
    callbacks = [callback, tuning] if first else [tuning, callback]
    make_trainer(callbacks=[*callbacks, notes], max_epochs=EPOCHS).fit(model, loader())
    return notes


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("config", [None, ULQ], ids=["arq", "ulq"])
@pytest.mark.parametrize("schedule", [None, DUE, {"start": 3}], ids=["none", "before", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_every_clip_is_in_one_group_for_clips(
    make_trainer: TrainerFactory, first: bool, schedule: Any, config: Any
) -> None:
    """Also if layers are thawed before the calibration, when all clips have the same values."""
    model = Transfer()
    notes = train(make_trainer, model, backbone(), first, config=config, schedule=schedule)
    factors = {id(p) for p in learned_factors(model)}
    factor_names = {name for name, p in model.named_parameters() if id(p) in factors}
    for epoch in range(EPOCHS):
        main, clips, *thawed = notes.groups[epoch * BATCHES]
        assert clips["weight_decay"] == 0
        assert clips["lr"] == main["lr"] / 2
        assert clips["params"] <= factor_names
        assert not factor_names & main["params"]
        if epoch >= THAW:
            assert clips["params"] == factor_names
            assert thawed[0]["params"] == {"backbone." + n for n in ("0.weight", "0.bias", "3.weight", "3.bias")}
            assert thawed[0]["lr"] == pytest.approx(1e-4 * 1.5 ** (epoch - THAW))


def test_the_clips_of_a_frozen_backbone_are_calibrated_and_then_wait(make_trainer: TrainerFactory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of clips that no optimizer trains, on purpose
        warnings.filterwarnings("ignore", "You defined a|.isinstance|The provided params to be frozen")
        notes = train(make_trainer, Transfer(), backbone(), schedule={"start": 1})
    calibrated = notes.clips[BATCHES]
    for step in range(BATCHES, THAW * BATCHES):
        assert torch.equal(notes.clips[step][:2], calibrated[:2])
    assert (notes.clips[-1] != calibrated).any(1).all()


def test_with_a_learning_rate_scheduler(make_trainer: TrainerFactory) -> None:
    class Scheduled(Transfer):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    notes = train(make_trainer, Scheduled(), backbone())
    for epoch in range(EPOCHS):
        main, clips, *_ = notes.groups[epoch * BATCHES]
        assert (main["lr"], clips["lr"]) == pytest.approx((1e-3 / 2**epoch, 1e-3 / 2**epoch / 2))


def test_a_backbone_alone_that_is_quantized_stays_the_last_group(make_trainer: TrainerFactory) -> None:
    """BackboneFinetuning sets the learning rate of the last group."""
    config = {"layers": {"head.*": {"activations": {}}}, "skip_layers": ["head.1", "head.3"]}
    notes = train(make_trainer, Transfer(), backbone(), config=config)
    for epoch in range(THAW, EPOCHS):
        _, clips, last = notes.groups[epoch * BATCHES]
        assert len(clips["params"]) == 4
        assert last["lr"] == pytest.approx(1e-4 * 1.5 ** (epoch - THAW))


def test_clips_that_the_user_has_left_out_stay_out(make_trainer: TrainerFactory) -> None:
    class Partial(Transfer):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head[1].parameters(recurse=False), lr=0.1)

    with pytest.warns(UserWarning, match="learned clip values are in no optimizer"):
        notes = train(make_trainer, Partial(), backbone())
    assert not any("head" in name and "quantizer" in name for group in notes.groups[-1] for name in group["params"])
    assert any("backbone.0.input_quantizer" in name for group in notes.groups[-1] for name in group["params"])


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("tuning", [backbone, InParts])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_run_goes_on(make_trainer: TrainerFactory, tmp_path: Path, first: bool, tuning: Any) -> None:
    """To the bit before layers are thawed; Lightning leaves them frozen if a run is resumed after that."""

    def run(out: Path, resume: Path | None = None) -> list[dict[str, Any]]:
        callback = QuantRetrainCallback(ULQ, out / "record.txt", quant_lr_scale=0.5, schedule={"start": 1})
        checkpoints = ModelCheckpoint(out, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False)
        callbacks, notes = [callback, tuning()] if first else [tuning(), callback], Notes()
        trainer = make_trainer(callbacks=[*callbacks, notes, checkpoints], max_epochs=EPOCHS, enable_checkpointing=True)
        model = Transfer()
        trainer.fit(model, loader(), ckpt_path=resume)
        assert QuantRecord.load(out / "record.txt") == QuantRecord.from_model(model)
        return notes.groups[-1]

    groups = run(tmp_path / "whole")
    for epoch in range(EPOCHS - 1):
        assert run(tmp_path / f"{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt") == groups
    assert_same(tmp_path / "whole", tmp_path / "0")
    loaded = load_qat_checkpoint(Transfer(), tmp_path / "3" / "last.ckpt")
    assert QuantRecord.from_model(loaded) == QuantRecord.load(tmp_path / "3" / "record.txt")
