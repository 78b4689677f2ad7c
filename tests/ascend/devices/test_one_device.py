"""Training on one simulated NPU: ``Trainer(accelerator="npu", devices=1, strategy="ascend")``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, DeviceStatsMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning.ascend import AscendStrategy, NPUAccelerator, NPUPrecision, NPUUnavailableError
from amct_lightning.modules import activation_quantizers
from tests.ascend.devices.test_stats import A2, fake_npu_smi
from tests.ascend.training import CPU, NPU, Net, fit, largest_difference, loader, make_trainer

pytestmark = pytest.mark.npu

MIXED = ("bf16-mixed", "16-mixed")


@pytest.mark.npu(fresh=True)
def test_a_trainer_can_be_made_without_initialising_a_device(tmp_path: Path) -> None:
    """So that a parent process can still fork, and holds no memory on a device."""
    assert NPUAccelerator.is_available()
    for count in ("auto", -1, 2, [1], "0,1"):
        trainer = make_trainer(tmp_path, accelerator="npu", devices=count, strategy="ascend", precision="bf16-mixed")
        assert trainer.strategy.root_device.type == "npu"
    assert not torch.npu.is_initialized()


def test_devices_are_the_ones_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accelerator="npu", devices=[1], strategy="ascend")
    assert trainer.strategy.root_device == torch.device("npu:1")
    assert make_trainer(tmp_path, accelerator="npu", devices="auto", strategy="ascend").num_devices == 2
    assert make_trainer(tmp_path, accelerator="auto").strategy.root_device.type == "cpu"  # as the documentation says
    with pytest.raises(MisconfigurationException, match="sees the devices 0 to 1"):
        make_trainer(tmp_path, accelerator="npu", devices=3, strategy="ascend")


@pytest.mark.parametrize("device", [0, 1])
def test_losses_and_record_equal_those_of_the_cpu(tmp_path: Path, device: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "npu").mkdir()
    on_cpu, _ = fit(tmp_path / "cpu", quantize=True, **CPU)
    on_npu, trainer = fit(tmp_path / "npu", quantize=True, **{**NPU, "devices": [device]})
    assert trainer.strategy.root_device == torch.device("npu", device)
    assert len(on_npu) == 8
    assert largest_difference(on_cpu, on_npu) <= 1e-5
    assert (tmp_path / "npu" / "r.txt").read_bytes() == (tmp_path / "cpu" / "r.txt").read_bytes()


def test_model_optimizer_and_batches_are_on_the_device_and_the_model_returns(tmp_path: Path) -> None:
    seen: set[str] = set()

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            states = trainer.optimizers[0].state.values()
            tensors = [*pl_module.parameters(), *pl_module.buffers(), *(state["exp_avg"] for state in states)]
            seen.update(str(tensor.device) for tensor in (*tensors, args[1][0], pl_module.losses[-1]))
            seen.add(str(pl_module.device))

    _, trainer = fit(tmp_path, callbacks=[Look()], **{**NPU, "devices": [1]})
    assert seen == {"npu:1"}
    assert trainer.lightning_module.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert not isinstance(trainer.train_dataloader.sampler, torch.utils.data.DistributedSampler)


def test_the_device_of_a_module_follows_the_method_npu(tmp_path: Path) -> None:
    NPUAccelerator().setup_device(torch.device("npu:0"))
    model = Net()
    for arguments, number in (((), 0), ((1,), 1), ((torch.device("npu:0"),), 0)):
        assert model.npu(*arguments) is model
        assert model.device == model.net[0].weight.device == torch.device("npu", number)
    assert model.cpu().device == torch.device("cpu")


@pytest.mark.parametrize("precision", [*MIXED, "bf16-true", "16-true"])
def test_precision_has_the_effect_it_has_on_the_cpu(tmp_path: Path, precision: Any) -> None:
    dtypes: set[torch.dtype] = set()

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.net[4].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            for quantizer in activation_quantizers(pl_module).values():
                assert quantizer.clip_max.dtype == quantizer.scale.dtype == torch.float32

    losses, trainer = fit(tmp_path, quantize=True, callbacks=[Look()], max_steps=3, precision=precision, **NPU)
    assert isinstance(trainer.precision_plugin, NPUPrecision)
    assert trainer.precision == precision
    assert dtypes == {torch.bfloat16 if precision.startswith("bf16") else torch.float16}
    exact, _ = fit(tmp_path, quantize=True, max_steps=3, **CPU)
    assert abs(losses[0] - exact[0]) < 0.05
    if precision != "16-true":  # where AdamW's epsilon of 1e-8 is 0
        assert largest_difference(losses, exact) < 0.05
    if precision in MIXED:
        assert losses != exact


def test_a_step_with_infinite_gradients_is_skipped_and_the_scale_is_kept_in_checkpoints(tmp_path: Path) -> None:
    weights: list[Tensor] = []

    class Spoil(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            weights.append(pl_module.net[4].weight.detach().cpu().clone())

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_step == 1:
                pl_module.net[4].weight.grad.fill_(float("inf"))

    scaler = torch.amp.GradScaler("npu", init_scale=1024.0, growth_interval=1000)
    plugin = NPUPrecision("16-mixed", scaler=scaler)
    _, trainer = fit(tmp_path, callbacks=[Spoil()], max_steps=3, plugins=[plugin], **NPU)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    first, second, third = weights
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
    assert torch.load(tmp_path / "a.ckpt")["NPUPrecision"]["scale"] == 512.0


def test_the_sanity_check_does_not_change_the_training(tmp_path: Path) -> None:
    with_check, _ = fit(tmp_path, dropout=0.5, num_sanity_val_steps=1, max_epochs=1, **NPU)
    without, _ = fit(tmp_path, dropout=0.5, num_sanity_val_steps=0, max_epochs=1, **NPU)
    assert with_check == without
    other_seed, _ = fit(tmp_path, dropout=0.5, seed=1, max_epochs=1, **NPU)
    assert other_seed != without  # the dropout does act


class SaveAfterFirstEpoch(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "first.ckpt")


def test_resuming_continues_with_the_random_numbers_of_the_checkpoint(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, dropout=0.5, callbacks=[SaveAfterFirstEpoch()], quantize=True, **NPU)
    resumed, _ = fit(tmp_path, dropout=0.5, seed=5, ckpt_path=tmp_path / "first.ckpt", quantize=True, **NPU)
    assert len(whole) == 8
    assert resumed == whole[4:]
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert [state.dtype for state in saved["npu_rng_states"]] == [torch.uint8]


def test_a_checkpoint_of_the_cpu_resumes_on_the_npu_and_the_reverse(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, callbacks=[SaveAfterFirstEpoch()], quantize=True, **CPU)
    on_npu, _ = fit(tmp_path, ckpt_path=tmp_path / "first.ckpt", quantize=True, **NPU)
    assert largest_difference(on_npu, whole[4:]) <= 1e-5
    fit(tmp_path, callbacks=[SaveAfterFirstEpoch()], quantize=True, **NPU)
    on_cpu, _ = fit(tmp_path, ckpt_path=tmp_path / "first.ckpt", quantize=True, **CPU)
    assert largest_difference(on_cpu, whole[4:]) <= 1e-5


def test_tensors_that_share_memory_on_the_npu_share_it_in_the_checkpoint(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(64, 3)
            self.twin.weight = self.net[4].weight

    trainer = make_trainer(tmp_path, max_epochs=1, **NPU)
    trainer.fit(Tied(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state["twin.weight"].data_ptr() == state["net.4.weight"].data_ptr()


class Hungry(pl.LightningModule):
    """Needs 1 MiB of device memory per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return self.layer(x.expand(-1, 1 << 18).contiguous()[:, :1]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.ones(512, 1)), self.batch_size)


@pytest.mark.npu(env={"SIM_NPU_MEM": "48"})
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder_recognises_that_memory_is_exhausted(tmp_path: Path, mode: str) -> None:
    model = Hungry()
    finder = BatchSizeFinder(mode=mode, steps_per_trial=1, init_val=2, margin=0.0)
    make_trainer(tmp_path, max_steps=1, callbacks=[finder], **NPU).fit(model)
    assert model.batch_size == 32 if mode == "power" else 32 <= model.batch_size < 48


@pytest.mark.npu(env={"SIM_NPU_MEM": "48"})
def test_outside_of_the_finder_the_error_is_still_the_one_of_the_device(tmp_path: Path) -> None:
    model = Hungry()
    model.batch_size = 256
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        make_trainer(tmp_path, max_steps=1, **NPU).fit(model)


def test_without_the_strategy_the_trainer_refuses_instead_of_using_the_cpu(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accelerator="npu", devices=1)
    with pytest.raises(MisconfigurationException, match=r"train on 'cpu'.*strategy='ascend'"):
        trainer.fit(Net(), loader())


class OwnStrategy(SingleDeviceStrategy):
    """A strategy that somebody made for themselves."""


def test_a_strategy_of_the_user_is_not_refused_but_mixed_precision_for_cuda_is(tmp_path: Path) -> None:
    strategy = OwnStrategy(torch.device("npu:0"))
    trainer = make_trainer(tmp_path, max_steps=1, accelerator="npu", devices=1, strategy=strategy)
    trainer.fit(Net(), loader())
    plugin = MixedPrecision("bf16-mixed", "cuda")
    strategy = OwnStrategy(torch.device("npu:0"))
    trainer = make_trainer(tmp_path, accelerator="npu", devices=1, strategy=strategy, plugins=[plugin])
    with pytest.raises(MisconfigurationException, match=r"'bf16-mixed' would have no effect.*strategy='ascend'"):
        trainer.fit(Net(), loader())


def test_float64_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"64-true.*HCCL"):
        make_trainer(tmp_path, precision="64-true", **NPU)


def test_a_device_that_cannot_be_opened_is_explained() -> None:
    with pytest.raises(NPUUnavailableError, match=r"npu:7 could not be opened: there is no such device.*npu-smi info"):
        NPUAccelerator().setup_device(torch.device("npu:7"))


def test_statistics_of_allocator_and_npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(fake_npu_smi(tmp_path, A2)).parent}:{os.environ['PATH']}")
    accelerator = NPUAccelerator()
    held = torch.ones(1 << 20, device="npu:1")
    statistics = accelerator.get_device_stats(torch.device("npu:1"))
    assert statistics["allocated_bytes.all.current"] >= held.numel() * 4
    assert statistics["npu.temperature (°C)"] == 61.0
    assert accelerator.get_device_stats(0)["npu.temperature (°C)"] == 48.0


def test_device_stats_monitor_logs_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, callbacks=[DeviceStatsMonitor()], logger=logger, log_every_n_steps=1, max_steps=2, **NPU)
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.current" in columns


def test_options_of_torch_npu_are_set(tmp_path: Path) -> None:
    before = torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32
    try:
        strategy = AscendStrategy(hf32_matmul=True, hf32_conv=False, allow_internal_format=False)
        fit(tmp_path, max_steps=1, accelerator="npu", devices=1, strategy=strategy)
        assert (torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32) == (True, False)
    finally:
        torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32 = before


@pytest.mark.npu(fresh=True)
def test_fork_is_refused_once_a_device_is_in_use(tmp_path: Path) -> None:
    torch.ones(1, device="npu:0")
    strategy = AscendStrategy(start_method="fork")
    trainer = make_trainer(tmp_path, accelerator="npu", devices=2, strategy=strategy)
    with pytest.raises(RuntimeError, match=r"start_method='fork'.*Use start_method='popen'"):
        trainer.fit(Net(), loader())
