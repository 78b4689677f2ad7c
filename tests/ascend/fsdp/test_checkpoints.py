"""Checkpoints of sharded models: folders and files, resumed from by the same and by other strategies."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.ascend import AscendFSDPStrategy
from tests.ascend.fsdp.sharded import CNN, factors, run
from tests.ascend.training import largest_difference, loader, make_trainer

RANK = int(os.environ.get("RANK", "0"))

two_ranks = pytest.mark.npu(nproc=2)


def shared(path: Path) -> Path:
    """The path of rank 0, once the ranks are connected."""
    paths: list[Any] = [path]
    dist.broadcast_object_list(paths, 0, device=torch.device("npu", RANK))
    return Path(paths[0])


def files() -> AscendFSDPStrategy:
    return AscendFSDPStrategy(save_distributed_checkpoint=False)


class SaveFirst(pl.Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, folder: Path, weights_only: bool = False) -> None:
        self.folder, self.weights_only = folder, weights_only
        self.path = folder / "first.ckpt"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.path = shared(self.folder) / "first.ckpt"
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


def saved(folder: Path, strategy: Any, **settings: Any) -> tuple[list[float], Path, pl.Trainer]:
    save = SaveFirst(folder)
    losses, trainer = run(folder, CNN(), strategy=strategy, callbacks=[save], **settings)
    return losses, save.path, trainer


@two_ranks
@pytest.mark.parametrize("strategy", ["ascend_fsdp", files])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, strategy: Any) -> None:
    make = strategy if callable(strategy) else lambda: strategy
    losses, path, whole = saved(tmp_path, make())
    resumed, trainer = run(tmp_path, CNN(), strategy=make(), ckpt_path=path)
    assert len(losses) == 2 * len(resumed) == 8
    assert resumed == losses[4:]
    assert factors(trainer.lightning_module) == factors(whole.lightning_module)
    assert path.is_dir() == (strategy == "ascend_fsdp")
    record = path.with_name("first.record.txt")
    entry = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)["amct_lightning"]
    assert QuantRecord.load(record) == QuantRecord.from_text(entry["record"])
    assert not [left.name for left in path.parent.iterdir() if left.name.startswith(".")]


@two_ranks
def test_copies_and_shards_go_on_from_each_others_files(tmp_path: Path) -> None:
    expected, from_copies, _ = saved(tmp_path, "ascend")
    losses, from_shards, _ = saved(tmp_path / "other", files())
    assert largest_difference(losses, expected) <= 1e-5
    as_shards, _ = run(tmp_path, CNN(), strategy="ascend_fsdp", ckpt_path=from_copies)
    as_copies, _ = run(tmp_path, CNN(), strategy="ascend", ckpt_path=from_shards)
    assert largest_difference(as_shards, expected[4:]) <= 1e-5
    assert largest_difference(as_copies, expected[4:]) <= 1e-5


@two_ranks
def test_frozen_factors_without_a_state_in_the_optimizer_are_resumed(tmp_path: Path) -> None:
    quantize = {"schedule": {"start": 1}}
    for make in (lambda: "ascend_fsdp", files):
        losses, path, _ = saved(tmp_path, make(), quantize=quantize)
        resumed, _ = run(tmp_path, CNN(), strategy=make(), ckpt_path=path, quantize=quantize)
        assert resumed == losses[4:]


@two_ranks
def test_evaluation_from_a_folder_and_weights_only(tmp_path: Path) -> None:
    _, path, trained = saved(tmp_path, "ascend_fsdp", max_epochs=1)
    model = CNN()
    trainer = make_trainer(
        tmp_path, accelerator="npu", devices=2, strategy="ascend_fsdp", callbacks=[QuantRetrainCallback()]
    )
    (metrics,) = trainer.validate(model, loader(2), ckpt_path=path, verbose=False)
    assert metrics["val_loss"] == pytest.approx(trained.callback_metrics["val_loss"].item(), abs=1e-6)
    small = shared(tmp_path) / "small.ckpt"
    trainer.save_checkpoint(small, weights_only=True)
    assert (small.parent / "small.record.txt").exists()
    with pytest.raises(RuntimeError, match=r"no parameter groups for AdamW"):
        run(tmp_path, CNN(), strategy="ascend_fsdp", ckpt_path=small)


@two_ranks
def test_best_checkpoints_are_kept_and_removed_with_their_records(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path / "best", save_top_k=1, monitor="val_loss", save_last=True, filename="{epoch}"
    )
    run(tmp_path, CNN(), callbacks=[checkpoint], max_epochs=3, enable_checkpointing=True)
    names = {path.name for path in Path(checkpoint.best_model_path).parent.iterdir()}
    best = Path(checkpoint.best_model_path).stem
    assert names == {f"{best}.ckpt", f"{best}.record.txt", "last.ckpt", "last.record.txt"}


@two_ranks
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, path, _ = saved(tmp_path, "ascend_fsdp", max_epochs=1)
    with pytest.raises(ValueError, match=r"quantized differently from the model: batch_num is 1 there and 3 here"):
        run(tmp_path, CNN(), ckpt_path=path, quantize={"config": {"batch_num": 3}})
    with pytest.raises(RuntimeError, match=r"does not fit CNN: the model has no .*input_quantizer"):
        run(tmp_path, CNN(), ckpt_path=path, quantize=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(tmp_path, CNN(), ckpt_path=tmp_path / "missing.ckpt")


def save_both(folder: str) -> list[float]:
    """In every rank: a training that leaves a file and a folder."""
    run(Path(folder), CNN(), strategy=files())[1].save_checkpoint(Path(folder) / "file.ckpt")
    losses, trainer = run(Path(folder), CNN(), strategy="ascend_fsdp")
    trainer.save_checkpoint(Path(folder) / "folder.ckpt")
    return losses


def resume_on_one(folder: str) -> list[float]:
    """On one device: the training goes on from the folder that two have written."""
    settings: dict[str, Any] = {"devices": 1, "max_epochs": 3, "use_distributed_sampler": False}
    return run(Path(folder), CNN(), ckpt_path=Path(folder) / "folder.ckpt", **settings)[0]


def test_other_machines_go_on_from_folders_and_files(
    npu_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu_run(save_both, str(tmp_path), devices=2, nproc=2)
    (on_one,) = npu_run(resume_on_one, str(tmp_path), devices=1)
    assert "torch_npu" not in sys.modules
    arguments = ["consolidate", str(tmp_path / "folder.ckpt"), "--output_file", str(tmp_path / "one.ckpt")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    for name in ("file.ckpt", "one.ckpt"):
        model = load_qat_checkpoint(CNN(), tmp_path / name)
        assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
        assert QuantRecord.from_model(model) == QuantRecord.load(
            tmp_path / f"{name.replace('one', 'folder')[:-5]}.record.txt"
        )
        settings = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_epochs": 3}
        resumed, _ = run(tmp_path, CNN(), ckpt_path=tmp_path / name, **settings)
        assert len(resumed) == 8
        assert largest_difference(resumed, on_one.value) <= 1e-5
