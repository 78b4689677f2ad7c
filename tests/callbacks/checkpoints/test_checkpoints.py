"""The record at every checkpoint, and resuming to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from amct_lightning import QuantRecord, QuantRetrainCallback, RetrainConfig
from tests.callbacks.conftest import Net, TrainerFactory, loader


def _state(model: pl.LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def test_every_checkpoint_has_its_record_and_takes_it_along(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", save_top_k=2, monitor="step", mode="max", save_last=True)
    trainer = make_trainer(
        callbacks=[checkpoint, QuantRetrainCallback(record_file=tmp_path / "r.txt")],
        max_epochs=4,
        enable_checkpointing=True,
    )
    trainer.fit(Net(), loader())
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == [
        "epoch=2.ckpt", "epoch=2.record.txt", "epoch=3.ckpt", "epoch=3.record.txt", "last.ckpt", "last.record.txt",
    ]  # fmt: skip
    last = QuantRecord.load(tmp_path / "ckpt" / "last.record.txt")
    assert last == QuantRecord.load(tmp_path / "ckpt" / "epoch=3.record.txt") == QuantRecord.load(tmp_path / "r.txt")
    assert last != QuantRecord.load(tmp_path / "ckpt" / "epoch=2.record.txt")


def test_weights_only_checkpoints_have_their_record_too(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", save_weights_only=True)
    make_trainer(callbacks=[checkpoint, QuantRetrainCallback()], enable_checkpointing=True).fit(Net(), loader())
    assert len(QuantRecord.load(tmp_path / "ckpt" / "epoch=1.record.txt")) == 2
    loaded = torch.load(tmp_path / "ckpt" / "epoch=1.ckpt", weights_only=True)
    assert loaded["amct_lightning"]["plan"]["config"]["batch_num"] == 1


def test_the_record_is_that_of_the_weights_in_the_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert QuantRecord.load(tmp_path / "a.record.txt") == QuantRecord.from_model(model)


class _Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped by the test")


@pytest.mark.parametrize(("batch_num", "stop"), [(1, 2), (3, 2), (3, 6)], ids=["learning", "calibrating", "later"])
def test_resuming_continues_to_the_bit_without_a_config_file(
    make_trainer: TrainerFactory, tmp_path: Path, batch_num: int, stop: int
) -> None:
    path = tmp_path / "config.json"
    config = RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4))
    config.batch_num = batch_num

    def trainer() -> pl.Trainer:
        callback = QuantRetrainCallback(path, tmp_path / "r.txt")
        checkpoint = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        return make_trainer(callbacks=[callback, checkpoint], enable_checkpointing=True, max_epochs=4)

    config.to_json(path)
    whole = Net()
    trainer().fit(whole, loader(batches=2))
    record = (tmp_path / "r.txt").read_text()

    path.unlink()
    resumed = Net()
    trainer().fit(resumed, loader(batches=2), ckpt_path=tmp_path / "ckpt" / f"step={stop}.ckpt")
    _assert_equal(_state(resumed), _state(whole))
    assert (tmp_path / "r.txt").read_text() == record


def test_testing_from_a_checkpoint_needs_no_config(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4)).to_json(path)
    trained = Net()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(path)])
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer.test(trained, loader(1), verbose=False)
    path.unlink()
    fresh = make_trainer(callbacks=[QuantRetrainCallback(path)])
    assert fresh.test(Net(), loader(1), ckpt_path=tmp_path / "a.ckpt", verbose=False) == expected


def test_a_checkpoint_quantized_differently_is_refused(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    config = RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4))
    del config["net.4"]
    with pytest.raises(ValueError, match=r"a\.ckpt' was quantized differently.*'net\.4'"):
        make_trainer(callbacks=[QuantRetrainCallback(config)]).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_float_checkpoint_loads_into_the_converted_model(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2, max_epochs=-1)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()], max_steps=1, max_epochs=-1).fit(model, loader())
    model.load_state_dict(torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"])


def test_an_exception_leaves_the_record_of_the_last_good_state(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make_trainer(callbacks=[QuantRetrainCallback(record_file=tmp_path / "r.txt"), _Stop(3)]).fit(model, loader())
    assert QuantRecord.load(tmp_path / "r.txt") == QuantRecord.from_model(model)


def test_an_exception_before_calibration_writes_no_record(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    config = RetrainConfig.default(Net(), torch.zeros(1, 2, 4, 4))
    config.batch_num = 3
    (tmp_path / "r.txt").write_text("old content")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        make_trainer(callbacks=[QuantRetrainCallback(config, tmp_path / "r.txt"), _Stop(1)]).fit(Net(), loader())
    assert (tmp_path / "r.txt").read_text() == "old content"


def test_without_checkpointing_the_record_is_written_when_training_ends(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    model = Net()
    make_trainer(callbacks=[QuantRetrainCallback()]).fit(model, loader())
    assert QuantRecord.load(tmp_path / "record.txt") == QuantRecord.from_model(model)


def test_a_failing_save_leaves_the_old_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[QuantRetrainCallback()])
    model = Net()
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    model.on_save_checkpoint = lambda checkpoint: checkpoint.update(bad=lambda: None)  # type: ignore[method-assign]
    with pytest.raises(Exception, match="pickle"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
