"""Strategies of Lightning, float64, profilers and channels_last on NPUs; the table of facts is in ``test_facts.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional

from tests.ascend.training import CPU, NPU, Net, fit, largest_difference, loader, make_trainer

RANK = int(os.environ.get("RANK", "0"))
WRITE = r"Write Trainer\(accelerator='npu', strategy='ascend', \.\.\.\)"

one_device = pytest.mark.npu
two_ranks = pytest.mark.npu(nproc=2)


@one_device
def test_auto_and_gpu_do_not_mean_the_npu(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, accelerator="auto").strategy.root_device == torch.device("cpu")
    with pytest.raises(MisconfigurationException, match="No supported gpu backend found"):
        make_trainer(tmp_path, accelerator="gpu")


@one_device
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_no_entry_point_and_no_precision_ends_on_the_cpu(tmp_path: Path, precision: Any) -> None:
    trainer = make_trainer(tmp_path, accelerator="npu", devices=1, precision=precision)
    for start in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(MisconfigurationException, match=WRITE):
            start(Evaluated(), loader())


class Evaluated(Net):
    """Net for all four entry points."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


@one_device
@pytest.mark.parametrize(
    "strategy",
    [DDPStrategy, "ddp", "ddp_find_unused_parameters_true", lambda: SingleDeviceStrategy(torch.device("npu:0"))],
    ids=["DDPStrategy", "ddp", "ddp_find_unused_parameters_true", "SingleDeviceStrategy"],
)
def test_a_strategy_of_lightning_is_refused_with_what_to_write(tmp_path: Path, strategy: Any) -> None:
    given = strategy if isinstance(strategy, str) else strategy()
    trainer = make_trainer(tmp_path, accelerator="npu", devices=1, strategy=given)
    model = Net()
    with pytest.raises(MisconfigurationException, match=rf"made for other devices.*{WRITE}"):
        trainer.fit(model, loader())
    assert not model.losses


class Renamed(DDPStrategy):
    """DDPStrategy under another name."""


class WrapsByItself(DDPStrategy):
    """What somebody may have written for NPUs."""

    def _setup_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.root_device.index])


@one_device
def test_a_strategy_made_from_ddp_is_refused_unless_it_wraps_by_itself(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Renamed is made for other devices.*{WRITE}"):
        make_trainer(tmp_path, accelerator="npu", devices=1, strategy=Renamed()).fit(Net(), loader())
    trainer = make_trainer(tmp_path, max_steps=1, accelerator="npu", devices=1, strategy=WrapsByItself())
    trainer.fit(Net(), loader())
    assert trainer.global_step == 1


@two_ranks
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_two_devices_without_a_strategy_are_refused_with_what_to_write(
    tmp_path_factory: pytest.TempPathFactory, strategy: str
) -> None:
    folder = tmp_path_factory.mktemp(f"rank{RANK}")
    trainer = make_trainer(folder, accelerator="npu", devices=2, strategy=strategy)
    with pytest.raises(MisconfigurationException, match=WRITE):
        trainer.fit(Net(), loader())


@one_device
@pytest.mark.parametrize("strategy", ["fsdp", FSDPStrategy])
def test_fsdp_of_lightning_is_refused_when_the_trainer_is_made(tmp_path: Path, strategy: Any) -> None:
    """The words are Lightning's, and it advises CUDA: nothing of this package is asked before."""
    given = strategy if isinstance(strategy, str) else strategy()
    with pytest.raises(ValueError, match=r"`fsdp` requires a GPU accelerator, but received `accelerator='npu'`"):
        make_trainer(tmp_path, accelerator="npu", devices=2, strategy=given)


@two_ranks
def test_the_model_parallel_strategy_of_lightning_fails_loudly(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(f"rank{RANK}")
    trainer = make_trainer(folder, accelerator="npu", devices=2, strategy=ModelParallelStrategy())
    with pytest.raises(RuntimeError, match="does not support splitting"):
        trainer.fit(Net(), loader())


class ConfiguresItself(Net):
    def configure_model(self) -> None: ...


@one_device
def test_the_model_parallel_strategy_of_lightning_is_refused_on_one_device(tmp_path: Path) -> None:
    """There its process group starts; the advice is the strategy that shards."""
    trainer = make_trainer(tmp_path, accelerator="npu", devices=1, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy is made for.*strategy='ascend_fsdp'"):
        trainer.fit(ConfiguresItself(), loader())


class Double(Net):
    """float64 where users have it: in a loss, in a metric, in what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric().set_dtype(torch.float64)
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx).double() * self.factor
        self.mean(loss.detach())
        whole = torch.tensor(1.0 + RANK * 2**-40, dtype=torch.float64, device=self.device)
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        self.log("logged", whole, on_step=False, on_epoch=True, sync_dist=True)
        return loss


@two_ranks
def test_float64_in_metrics_and_losses_works_on_two_devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(f"rank{RANK}")
    model = Double()
    trainer = make_trainer(folder, max_epochs=1, **{**NPU, "devices": 2})
    trainer.fit(model, loader())
    mine = torch.stack([loss.double() for loss in model.losses]).mean()
    assert trainer.callback_metrics["metric"].item() == pytest.approx(trainer.strategy.reduce(mine).item(), abs=1e-12)
    assert trainer.callback_metrics["logged"].item() == 1.0 + 2**-41


class WholeModelDouble(Net):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x.double()), y)


@two_ranks
def test_a_model_in_float64_on_two_devices_is_explained(tmp_path_factory: pytest.TempPathFactory) -> None:
    trainer = make_trainer(tmp_path_factory.mktemp(f"rank{RANK}"), **{**NPU, "devices": 2})
    with pytest.raises(RuntimeError, match=r"(?s)Unsupported data type at::kDouble.*model\.float\(\)"):
        trainer.fit(WholeModelDouble(), loader())


@one_device
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_profilers_of_lightning_see_the_training(tmp_path: Path, profiler: type[Profiler]) -> None:
    """What happens on the device itself is seen by ``torch_npu.profiler`` only."""
    losses, _ = fit(tmp_path, max_steps=3, profiler=profiler(dirpath=tmp_path, filename="report"), **NPU)
    without, _ = fit(tmp_path, max_steps=3, **NPU)
    assert losses == without
    assert "training_step" in (tmp_path / "fit-report.txt").read_text()


class ChannelsLastInStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x.to(memory_format=torch.channels_last), y), batch_idx)


@one_device
def test_a_channels_last_tensor_on_the_device_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Only c10::MemoryFormat::Contiguous.*Leave out memory_format"):
        make_trainer(tmp_path, **NPU).fit(ChannelsLastInStep(), loader())


@one_device
def test_a_model_made_channels_last_on_the_cpu_trains(tmp_path: Path) -> None:
    model, expected = Net().to(memory_format=torch.channels_last), Net()
    make_trainer(tmp_path, max_steps=3, **NPU).fit(model, loader())
    make_trainer(tmp_path, max_steps=3, **CPU).fit(expected, loader())
    losses = [[loss.item() for loss in one.losses] for one in (model, expected)]
    assert largest_difference(*losses) <= 1e-5
