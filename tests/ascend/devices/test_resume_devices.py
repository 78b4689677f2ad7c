"""A run goes on with another number of devices, and on another kind of device."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from amct_lightning import QuantRecord, QuantRetrainCallback, load_qat_checkpoint, quantized_layers
from tests.ascend.training import CPU, NPU, Net, largest_difference, loader, make_trainer
from tests.ascend_sim import npu_run as run_ranks

BATCHES = 8


class AtTheStart(pl.Callback):
    """What model and optimizer know before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = copied(dict(pl_module.state_dict()))
        self.optimizer = copied(trainer.optimizers[0].state_dict()["state"])


def copied(state: dict[Any, Any]) -> dict[Any, Any]:
    return copy.deepcopy(move_data_to_device(state, "cpu"))


def epoch(folder: Path, number: int, **settings: Any) -> dict[str, Any]:
    """Train one epoch, from the checkpoint before it to the one after it; every rank calls this."""
    model, start = Net(), AtTheStart()
    pl.seed_everything(number, verbose=False)
    callbacks = [QuantRetrainCallback(record_file=folder / f"{number}.record.txt"), start]
    trainer = make_trainer(folder, max_epochs=number, callbacks=callbacks, **settings)
    before = folder / f"{number - 1}.ckpt"
    trainer.fit(model, loader(BATCHES), loader(1), ckpt_path=before if before.exists() else None)
    trainer.save_checkpoint(folder / f"{number}.ckpt")
    with torch.no_grad():
        outputs = model.eval()(next(iter(loader(1)))[0])
    losses = [loss.item() for loss in model.losses]
    return {"losses": losses, "weights": start.weights, "optimizer": start.optimizer, "outputs": outputs}


def one_two_one(name: str) -> list[dict[str, Any]]:
    """Epochs 2 and 4 on one device, which is rank 0's, epoch 3 on two."""
    folder, first = Path(name), os.environ["RANK"] == "0"
    found = [epoch(folder, 2, **NPU)] if first else []
    while not (folder / "2.ckpt").exists():
        time.sleep(0.05)
    found.append(epoch(folder, 3, **{**NPU, "devices": 2}))
    dist.destroy_process_group()
    return [*found, epoch(folder, 4, **NPU)] if first else found


@dataclass(frozen=True)
class Run:
    """Epoch 1 on the CPU of this process, 2 to 4 on NPUs."""

    folder: Path
    epochs: dict[int, dict[str, Any]]
    other_rank: dict[str, Any]
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    first = epoch(folder, 1, **CPU)
    rank_0, rank_1 = run_ranks(one_two_one, str(folder), nproc=2)
    epochs = dict(enumerate([first, *rank_0.value], start=1))
    return Run(folder, epochs, rank_1.value[0], rank_0.output)


def on_cpu(run: Run, number: int, folder: Path) -> dict[str, Any]:
    """The same epoch in this process, which has no torch_npu."""
    assert "torch_npu" not in sys.modules
    shutil.copy(run.folder / f"{number - 1}.ckpt", folder)
    return epoch(folder, number, **CPU)


@pytest.mark.parametrize("number", [2, 4])
def test_the_cpu_goes_on_from_the_same_checkpoint_with_the_same_losses(
    npu_run: Any, run: Run, number: int, tmp_path: Path
) -> None:
    expected = on_cpu(run, number, tmp_path)
    assert len(expected["losses"]) == BATCHES
    assert largest_difference(run.epochs[number]["losses"], expected["losses"]) <= 1e-5
    assert torch.allclose(run.epochs[number]["outputs"], expected["outputs"], atol=1e-5)
    name = f"{number}.record.txt"
    assert QuantRecord.load(run.folder / name).allclose(QuantRecord.load(tmp_path / name), rtol=1e-6)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_weights_factors_and_optimizer_are_carried_over(npu_run: Any, run: Run, number: int) -> None:
    saved = torch.load(run.folder / f"{number - 1}.ckpt", weights_only=True)
    assert {tensor.device.type for tensor in saved["state_dict"].values()} == {"cpu"}
    assert any("clip_max" in name for name in saved["state_dict"])
    for start in (run.epochs[number], *([run.other_rank] if number == 3 else [])):
        assert_equal(start["weights"], saved["state_dict"])
        (optimizer,) = saved["optimizer_states"]
        assert start["optimizer"].keys() == optimizer["state"].keys()
        for index, state in optimizer["state"].items():
            assert_equal(start["optimizer"][index], state)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_two_devices_share_the_batches_of_an_epoch(npu_run: Any, run: Run) -> None:
    assert len(run.epochs[3]["losses"]) == len(run.other_rank["losses"]) == BATCHES // 2
    assert run.epochs[3]["losses"] != run.other_rank["losses"]
    assert torch.equal(run.epochs[3]["outputs"], run.other_rank["outputs"])
    QuantRecord.load(run.folder / "3.record.txt").validate()


def test_random_number_generators_of_other_devices_are_left_out_and_that_is_said(npu_run: Any, run: Run) -> None:
    for saved, here in ((1, 2), (2, 1)):
        assert f"has the random number generators of {saved} NPU(s) (npu_rng_states), this run has {here}" in run.output
    assert run.output.count("random number generators of") == 2  # not about the checkpoint of the CPU


def test_checkpoints_of_npus_load_without_torch_npu(npu_run: Any, run: Run) -> None:
    assert "torch_npu" not in sys.modules
    path = run.folder / "4.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    quantized = load_qat_checkpoint(Net, path)
    assert list(quantized_layers(quantized)) == ["net.0", "net.4"]
    assert_equal(dict(quantized.state_dict()), saved)
    x, _ = next(iter(loader(1)))
    with torch.no_grad():
        assert torch.allclose(quantized.eval()(x), run.epochs[4]["outputs"], atol=1e-5)
    plain = Net.load_from_checkpoint(path, strict=False)  # the float model
    assert torch.equal(plain.net[4].weight, saved["net.4.weight"])
