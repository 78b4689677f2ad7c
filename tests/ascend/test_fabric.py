"""Lightning Fabric on simulated NPUs: ``Fabric(accelerator="npu", strategy="ascend")``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric as lf
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from amct_lightning import QuantRecord, calibrate, prepare_qat
from amct_lightning.ascend import AscendFabricStrategy, NPUAccelerator, NPUUnavailableError
from amct_lightning.ascend.hccl import HCCLSettings, NPUOptions
from tests.ascend.training import Net, largest_difference, loader

one_device = pytest.mark.npu
two_ranks = pytest.mark.npu(nproc=2)
RANK = int(os.environ.get("RANK", "0"))


def make_fabric(**settings: Any) -> lf.Fabric:
    fabric = lf.Fabric(**{"accelerator": "npu", "devices": 1, "strategy": "ascend", **settings})
    fabric.launch()
    return fabric


def train(fabric: lf.Fabric, float_model: nn.Module, data: DataLoader[tuple[Tensor, ...]]) -> tuple[list[float], Any]:
    """Quantization-aware training in a loop of one's own, after a calibration."""
    quantized = prepare_qat(float_model, None, torch.zeros(1, 2, 4, 4))
    model, optimizer = fabric.setup(quantized, torch.optim.SGD(quantized.parameters(), lr=0.1))
    calibrate(quantized, (x.to(fabric.device) for x, _ in loader(1)))
    losses = []
    for x, y in fabric.setup_dataloaders(data):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses], model


@one_device
def test_one_device_trains_as_the_cpu(tmp_path: Path) -> None:
    on_cpu, reference = train(make_fabric(accelerator="cpu", strategy="auto"), Net().net, loader())
    fabric = make_fabric(devices=[1])
    on_npu, model = train(fabric, Net().net, loader())
    assert largest_difference(on_cpu, on_npu) <= 1e-5
    assert model.device == next(model.parameters()).device == torch.device("npu:1")
    assert not isinstance(model.module, DistributedDataParallel)
    assert not torch.distributed.is_initialized()
    for name, module in (("cpu", reference), ("npu", model)):
        QuantRecord.from_model(module.module).save(tmp_path / name)
    assert (tmp_path / "npu").read_bytes() == (tmp_path / "cpu").read_bytes()
    with fabric.no_backward_sync(model):
        assert fabric.all_reduce(torch.tensor(3)).item() == 3


@one_device
@pytest.mark.filterwarnings("error:.*CUDA is not available")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_casts_on_the_npu(precision: Any, dtype: torch.dtype) -> None:
    fabric = make_fabric(precision=precision)
    losses, model = train(fabric, Net().net, loader())
    reference, _ = train(make_fabric(), Net().net, loader())
    assert 0 < largest_difference(losses, reference) < 0.05
    seen: list[torch.dtype] = []
    model.module[4].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model(torch.zeros(1, 2, 4, 4, device=fabric.device))
    assert seen == [dtype]


@one_device
def test_checkpoints_hold_cpu_tensors_and_load_again(tmp_path: Path) -> None:
    fabric = make_fabric()
    _, model = train(fabric, Net().net, loader())
    fabric.save(tmp_path / "a.ckpt", {"model": model, "mean": torch.ones(2, device="npu:0")})
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert state["model"]["4.weight"].device == state["mean"].device == torch.device("cpu")
    before = model.module[4].weight.detach().clone()
    nn.init.zeros_(model.module[4].weight)
    fabric.load(tmp_path / "a.ckpt", {"model": model})
    assert torch.equal(model.module[4].weight, before)


@one_device
def test_settings_are_applied() -> None:
    before = torch.npu.matmul.allow_hf32
    try:
        make_fabric(strategy=AscendFabricStrategy(options=NPUOptions(hf32_matmul=not before)))
        assert torch.npu.matmul.allow_hf32 == (not before)
    finally:
        torch.npu.matmul.allow_hf32 = before


@one_device
@pytest.mark.parametrize("accelerator", ["npu", NPUAccelerator])
def test_without_the_strategy_nothing_runs_on_the_cpu(accelerator: Any) -> None:
    given = accelerator if isinstance(accelerator, str) else accelerator()
    with pytest.raises(MisconfigurationException, match=r"train on 'cpu'.*strategy='ascend'"):
        make_fabric(accelerator=given, strategy="auto")


@one_device
def test_float64_and_other_accelerators_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"64-true.*HCCL"):
        make_fabric(precision="64-true")
    with pytest.raises(MisconfigurationException, match=r"CPUAccelerator.*Fabric\(accelerator='npu'"):
        make_fabric(accelerator="cpu")


def test_without_torch_npu_the_reason_is_given() -> None:
    with pytest.raises(NPUUnavailableError, match="pip install torch_npu=="):
        lf.Fabric(accelerator="npu", strategy="ascend")


@two_ranks
def test_two_devices_average_gradients() -> None:
    expected, whole = train_on_whole_batches(without_batch_norm())
    fabric = make_fabric(devices=2, strategy=AscendFabricStrategy(hccl=HCCLSettings(connect_timeout=150)))
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "150"
    assert torch.distributed.get_backend() == "hccl"
    losses, model = train(fabric, without_batch_norm(), loader())
    assert isinstance(model._forward_module, DistributedDataParallel)
    assert model.device == torch.device("npu", RANK)
    mean = fabric.all_reduce(torch.tensor(losses)).tolist()
    assert largest_difference(mean, expected) <= 1e-5
    for name, value in whole.state_dict().items():
        assert torch.allclose(model.state_dict()[name].cpu(), value, atol=1e-5), name


def without_batch_norm() -> nn.Sequential:
    """A network for which the mean over two halves of a batch is the mean over the batch."""
    layers = list(Net().net)
    return nn.Sequential(layers[0], *layers[2:])


def train_on_whole_batches(float_model: nn.Module) -> tuple[list[float], nn.Module]:
    """The steps of both ranks as one, on the CPU and without Fabric."""
    quantized = prepare_qat(float_model, None, torch.zeros(1, 2, 4, 4))
    calibrate(quantized, (x for x, _ in loader(1)))
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    data = loader().dataset
    parts = [iter(DataLoader(data, 8, sampler=DistributedSampler(data, 2, rank, shuffle=False))) for rank in (0, 1)]
    losses = []
    for pairs in zip(*parts, strict=True):
        loss = torch.stack([functional.cross_entropy(quantized(x), y) for x, y in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, quantized


@two_ranks
def test_objects_integers_and_decisions_of_two_ranks() -> None:
    fabric = make_fabric(devices=2)
    assert fabric.broadcast({"rank": RANK}, src=1) == {"rank": 1}
    assert fabric.all_reduce(torch.tensor([RANK, 5])).tolist() == [0.5, 5.0]
    assert fabric.all_reduce(torch.tensor(RANK, device=fabric.device), reduce_op="sum").item() == 1
    assert fabric.strategy.reduce_boolean_decision(RANK == 0, all=False)
    assert fabric.all_gather(torch.tensor([RANK], device=fabric.device)).flatten().tolist() == [0, 1]
    fabric.barrier()


@two_ranks
def test_the_strategy_for_cuda_fails_loudly() -> None:
    fabric = make_fabric(devices=2, strategy=DDPStrategy())
    with pytest.raises(RuntimeError, match="CUDA"):
        fabric.setup(nn.Linear(2, 2))


SCRIPT = """
import torch, lightning.fabric as lf, amct_lightning
fabric = lf.Fabric(accelerator="npu", devices=2, strategy="ascend")
fabric.launch()
total = fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum")
print(f"rank {fabric.global_rank} on {fabric.device}: {total.item()}", flush=True)
"""


def test_a_script_starts_its_processes(npu_run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (result,) = npu_run(tmp_path / "train.py", devices=2)
    assert "rank 0 on npu:0: 3.0" in result.output
    assert "rank 1 on npu:1: 3.0" in result.output
