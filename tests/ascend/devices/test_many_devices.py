"""Training on two simulated NPUs over HCCL, one process each."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

from amct_lightning.ascend import AscendStrategy
from tests.ascend.training import CPU, NPU, Net, fit, largest_difference, loader, make_trainer

RANK = int(os.environ.get("RANK", "0"))

two_ranks = pytest.mark.npu(nproc=2)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"rank{RANK}")


def fit_on_two(folder: Path, **settings: Any) -> tuple[list[float], pl.Trainer]:
    return fit(folder, **{**NPU, "devices": 2, **settings})


def connected(folder: Path) -> pl.Trainer:
    """A trainer after a run; its process group is still there."""
    return fit_on_two(folder, max_steps=1)[1]


@two_ranks
def test_reductions_are_right_for_every_dtype(folder: Path) -> None:
    reduce = connected(folder).strategy.reduce
    device = torch.device("npu", RANK)
    whole = torch.tensor([RANK, 5], device=device)
    mean = reduce(whole)
    assert mean.tolist() == [0.5, 5.0]
    assert mean.device == device
    assert whole.tolist() == [RANK, 5]  # unchanged
    assert reduce(whole, reduce_op="sum").tolist() == [1, 10]
    assert reduce(whole, reduce_op="sum").dtype == torch.int64
    assert reduce(whole, reduce_op=dist.ReduceOp.SUM).tolist() == [1, 10]
    assert reduce(whole.float(), reduce_op="max").tolist() == [1.0, 5.0]
    assert reduce(whole.half(), reduce_op="avg").tolist() == [0.5, 5.0]
    fine = torch.tensor(1.0 + RANK * 2**-40, dtype=torch.float64)
    assert reduce(fine).item() == 1.0 + 2**-41  # no float32 on the way
    assert reduce(fine, reduce_op="min").item() == 1.0
    assert reduce("text") == "text"
    with pytest.raises(ValueError, match="reduce_op='median' is not known"):
        reduce(whole, reduce_op="median")


@two_ranks
def test_decisions_objects_and_further_groups(folder: Path) -> None:
    strategy = connected(folder).strategy
    assert strategy.broadcast({"rank": RANK}, src=1) == {"rank": 1}
    assert strategy.reduce_boolean_decision(RANK == 0, all=False)
    assert not strategy.reduce_boolean_decision(RANK == 0)
    strategy.barrier()
    group = dist.new_group([0, 1])  # impossible had the device been bound to the process group
    assert strategy.reduce(torch.ones(1, device="npu"), group=group, reduce_op="sum").item() == 2.0
    assert dist.get_backend() == "hccl"


@two_ranks
def test_a_metric_of_integers_is_averaged_over_ranks(folder: Path) -> None:
    class Counting(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("count", torch.tensor(RANK + 3, device=self.device), sync_dist=True)
            self.log("total", torch.tensor(RANK + 3, device=self.device), sync_dist=True, reduce_fx="sum")

    trainer = make_trainer(folder, max_epochs=1, **{**NPU, "devices": 2})
    trainer.fit(Counting(), loader(), loader(2))
    assert trainer.callback_metrics["count"].item() == 3.5
    assert trainer.callback_metrics["total"].item() == 7.0


@two_ranks
@pytest.mark.parametrize("hook", [default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook])
def test_communication_hooks_compress_gradients(folder: Path, hook: Callable[..., Any]) -> None:
    used: list[torch.dtype] = []

    def noted(state: object, bucket: Any) -> Any:
        used.append(bucket.buffer().dtype)
        return hook(state, bucket)

    noted.__name__ = hook.__name__
    noted.__annotations__ = {}  # DDP takes the annotations of this file, which are texts, for wrong ones
    settings = {"accelerator": "npu", "devices": 2, "max_steps": 3}
    compressed, _ = fit(folder, strategy=AscendStrategy(ddp_comm_hook=noted), **settings)
    assert used
    assert all(abs(a) > 0 for a in compressed)
    wrapper = {default_hooks.fp16_compress_hook: default_hooks.fp16_compress_wrapper}.get(
        hook, default_hooks.bf16_compress_wrapper
    )
    wrapped = AscendStrategy(ddp_comm_hook=default_hooks.allreduce_hook, ddp_comm_wrapper=wrapper)
    assert largest_difference(fit(folder, strategy=wrapped, **settings)[0], compressed) < 0.01
    exact, _ = fit(folder, strategy=AscendStrategy(), **settings)
    assert 0 < largest_difference(compressed, exact) < 0.01


class WholeBatch(Net):
    """Loss and gradients of a batch that is split over ranks equal those of the whole batch."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@two_ranks
def test_synchronised_batch_norm_equals_one_process_with_the_whole_batch(folder: Path) -> None:
    split = WholeBatch()
    data = loader(batches=8, batch_size=8).dataset
    # rank 0 gets the even samples and rank 1 the odd ones: together, batches of 16 in their order
    sampler = DistributedSampler(data, num_replicas=2, rank=RANK, shuffle=False)
    trainer = make_trainer(
        folder, max_steps=3, sync_batchnorm=True, use_distributed_sampler=False, **{**NPU, "devices": 2}
    )
    trainer.fit(split, DataLoader(data, 8, sampler=sampler))
    whole = WholeBatch()
    make_trainer(folder, max_steps=3, **CPU).fit(whole, loader(batches=4, batch_size=16))
    assert not isinstance(split.net[1], nn.SyncBatchNorm)  # converted back after the run
    for name, value in whole.state_dict().items():
        assert torch.allclose(split.state_dict()[name].float(), value.float(), atol=1e-5), name


@two_ranks
def test_unused_parameters_are_explained_and_can_be_allowed(folder: Path) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    settings: dict[str, Any] = {"accelerator": "npu", "devices": 2, "max_steps": 3}
    with pytest.raises(RuntimeError, match=r"AscendStrategy\(find_unused_parameters=True\)"):
        make_trainer(folder, strategy="ascend", **settings).fit(Unused(), loader())
    allowed = AscendStrategy(find_unused_parameters=True)
    trainer = make_trainer(folder, strategy=allowed, **settings)
    trainer.fit(Unused(), loader(8))
    assert trainer.global_step == 3


class Manual(Net):
    """Net with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = functional.cross_entropy(self(x), y)
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.detach())


@two_ranks
@pytest.mark.parametrize("static_graph", [False, True])
def test_manual_optimization_equals_automatic(folder: Path, static_graph: bool) -> None:
    automatic, _ = fit_on_two(folder, max_epochs=1)
    model = Manual()
    strategy = AscendStrategy(static_graph=static_graph)
    make_trainer(folder, max_epochs=1, accelerator="npu", devices=2, strategy=strategy).fit(model, loader())
    assert [loss.item() for loss in model.losses] == automatic


@two_ranks
def test_validation_without_training_starts_from_equal_weights(folder: Path) -> None:
    model = Net()
    if RANK == 1:
        nn.init.ones_(model.net[4].weight)
    trainer = make_trainer(folder, **{**NPU, "devices": 2})
    (metrics,) = trainer.validate(model, loader(2), verbose=False)
    reference = make_trainer(folder, **CPU)
    (expected,) = reference.validate(Net(), loader(2), verbose=False)
    assert metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)


@two_ranks
def test_random_numbers_of_every_rank_are_in_the_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("both") if RANK == 0 else tmp_path_factory.mktemp("other")

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                torch.npu.manual_seed(100 + RANK)  # different per rank
                path = trainer.strategy.broadcast(str(folder / "a.ckpt"))
                trainer.save_checkpoint(path)
                self.path = path

    save = Save()
    whole, _ = fit_on_two(folder, dropout=0.5, callbacks=[save])
    resumed, _ = fit_on_two(folder, dropout=0.5, ckpt_path=save.path)
    assert (len(whole), len(resumed)) == (4, 2)
    assert resumed == whole[2:]
    first, second = torch.load(save.path, weights_only=True)["npu_rng_states"]
    assert not torch.equal(first, second)


def train_both(cpu_folder: str, npu_folder: str, port: int) -> tuple[list[float], list[float], dict[str, float]]:
    """In every rank: the same training over gloo on the CPU, then over HCCL on NPUs."""
    on_cpu, trainer = fit(Path(cpu_folder), quantize=True, accelerator="cpu", devices=2, strategy="ddp", batches=8)
    assert dist.get_backend() == "gloo"
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    dist.barrier()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    on_npu, trainer = fit(Path(npu_folder), quantize=True, batches=8, **{**NPU, "devices": 2})
    assert dist.get_backend() == "hccl"
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(metrics["val_loss"], abs=1e-5)
    trainer.save_checkpoint(Path(npu_folder) / "a.ckpt")
    return on_cpu, on_npu, metrics


def test_two_devices_equal_two_cpu_processes(npu_run: Callable[..., Any], tmp_path: Path) -> None:
    folders = tmp_path / "cpu", tmp_path / "npu"
    for each in folders:
        each.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = npu_run(train_both, *map(str, folders), port, devices=2, nproc=2)
    for result in results:
        on_cpu, on_npu, _ = result.value
        assert len(on_npu) == 8
        assert largest_difference(on_cpu, on_npu) <= 1e-5
    assert results[0].value[0] != results[1].value[0]  # the data was split
    assert (folders[1] / "r.txt").read_bytes() == (folders[0] / "r.txt").read_bytes()
    check_without_torch_npu(folders[1] / "a.ckpt")


def check_without_torch_npu(checkpoint: Path) -> None:
    """This process has no torch_npu."""
    assert "torch_npu" not in sys.modules
    state = torch.load(checkpoint, weights_only=True)
    assert state["state_dict"]["net.0.weight"].device.type == "cpu"
    restored = Net.load_from_checkpoint(checkpoint, strict=False)
    expected: Tensor = state["state_dict"]["net.4.weight"]
    assert torch.equal(restored.net[4].weight, expected)
