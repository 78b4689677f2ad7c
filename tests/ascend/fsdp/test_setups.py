"""Who shards and when, precision, schedules, monitoring, one device, and what is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from amct_lightning import QuantRecord, quantized_layers
from amct_lightning.ascend import AscendFSDPStrategy, NPUPrecision, register
from tests.ascend.fsdp.sharded import CNN, Base, Transformer, cnn_layers, factors, run
from tests.ascend.training import largest_difference, loader, make_trainer

RANK = int(os.environ.get("RANK", "0"))

two_ranks = pytest.mark.npu(nproc=2)


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


class ShardsItself(CNN):
    """Made in __init__, sharded in configure_model, which cannot be called twice."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[3], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class MakesItself(Base):
    """Made and sharded in configure_model."""

    net: nn.Module | None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = cnn_layers()
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)


class MakesLayers(MakesItself):
    """Made in configure_model, sharded by the strategy."""

    def configure_model(self) -> None:
        self.net = self.net or cnn_layers()


@two_ranks
@pytest.mark.parametrize("model", [ShardsItself, MakesItself, MakesLayers])
def test_layers_are_converted_before_or_after_they_are_sharded(tmp_path: Path, model: type[Base]) -> None:
    expected, copies = run(tmp_path / "copies", CNN(), strategy="ascend")
    losses, trainer = run(tmp_path / "shards", model())
    assert largest_difference(losses, expected) <= 1e-5
    net: Any = trainer.lightning_module.net
    assert isinstance(net[3].weight, DTensor)
    assert not isinstance(net[3].input_quantizer.clip_max, DTensor)
    assert list(trainer.lightning_module.state_dict()) == list(copies.lightning_module.state_dict())
    assert everyone(factors(trainer.lightning_module))[0] == factors(trainer.lightning_module)
    if RANK == 0:
        first, second = (QuantRecord.load(tmp_path / name / "record.txt") for name in ("copies", "shards"))
        assert second.allclose(first, rtol=1e-6)
    if model is not ShardsItself:  # whose configure_model fails when Lightning calls it again
        trainer.test(trainer.lightning_module, loader(1), verbose=False)


class Tested(CNN):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


MakesItself.test_step = MakesLayers.test_step = Tested.test_step  # type: ignore[attr-defined]


@two_ranks
def test_layers_that_cannot_be_converted_any_more_are_named(tmp_path: Path) -> None:
    class Late(CNN):
        def configure_model(self) -> None:
            self.late = nn.Linear(3, 3)

    class ByItself(MakesItself):
        def configure_model(self) -> None:
            if self.net is None:
                self.net = cnn_layers()
                fully_shard(self.net[7], mesh=self.device_mesh["data_parallel"])

    with pytest.raises(ValueError, match=r"configure_model of Late has made layers that are not quantized.*late"):
        run(tmp_path, Late())
    with pytest.raises(ValueError, match=r"calls fully_shard on 'net\.7' itself, a Linear"):
        run(tmp_path, ByItself())


class Noted(CNN):
    """Notes what it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.dtypes = x.dtype, y.dtype
        return y


@two_ranks
@pytest.mark.parametrize(
    ("precision", "computes", "stores", "tolerance"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32, 1e-5),
        ("16-mixed", torch.float16, torch.float32, 1e-5),
        # kernels round the last elements of a tensor otherwise than the others; the last bit of a loss is 2**-7
        ("bf16-true", torch.bfloat16, torch.bfloat16, 2 * 2**-7),
    ],
)
def test_precision(
    tmp_path: Path, precision: Any, computes: torch.dtype, stores: torch.dtype, tolerance: float
) -> None:
    quantize = {"config": {"weights": {"algo": "ulq_retrain"}}}
    settings = {"precision": precision, "gradient_clip_val": 1.0, "quantize": quantize, "max_steps": 2}
    model = Noted("sgd")
    losses, trainer = run(tmp_path, model, **settings)
    copies, _ = run(tmp_path, CNN("sgd"), strategy="ascend", **settings)
    assert losses[0] == copies[0]
    assert largest_difference(losses, copies) <= tolerance
    assert model.dtypes[1] == computes
    assert model.net[0].weight.dtype == stores
    assert {p.dtype for name, p in model.named_parameters() if "_quantizer" in name} == {torch.float32}
    assert everyone(factors(model))[0] == factors(model)
    if precision == "16-mixed":
        assert trainer.precision_plugin.scaler.get_scale() == 65536.0
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        assert state["NPUPrecision"]["scale"] == 65536.0


@two_ranks
def test_an_overflow_skips_the_step_on_all_ranks(tmp_path: Path) -> None:
    class Overflow(CNN):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if batch_idx == 1 and RANK == 1 else 1.0)

    plugin = NPUPrecision("16-mixed", torch.amp.GradScaler("npu", init_scale=64.0))
    _, trainer = run(tmp_path, Overflow("sgd"), plugins=[plugin], strategy=AscendFSDPStrategy(), max_epochs=1)
    assert trainer.precision_plugin.scaler.get_scale() == 32.0
    assert all(torch.isfinite(p).all() for p in map(local, trainer.lightning_module.parameters()))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.usefixtures("every_execution")
@two_ranks
def test_schedule_monitor_and_shift_search_read_sharded_weights(tmp_path: Path) -> None:
    schedule = {"start": 1, "freeze_data": 3, "freeze_weights": 2, "freeze_bn": 2}
    settings: dict[str, Any] = {"quantize": {"schedule": schedule, "search_n": True}, "monitor": True, "max_epochs": 4}
    expected, copies = run(tmp_path / "copies", CNN(), strategy="ascend", **settings)
    losses, trainer = run(tmp_path / "shards", CNN(), **settings)
    assert largest_difference(losses, expected) <= 1e-5
    assert everyone(factors(trainer.lightning_module))[0] == factors(trainer.lightning_module)
    weight = local(trainer.lightning_module.net[1].weight)
    assert torch.equal(weight.cpu(), copies.lightning_module.net[1].weight.chunk(2)[RANK].cpu())
    if RANK == 0:
        first, second = (QuantRecord.load(tmp_path / name / "record.txt") for name in ("copies", "shards"))
        assert second.allclose(first, rtol=1e-6), second.differences(first, rtol=1e-6)
        assert second["net.0"].shift_bit
        lines = [(tmp_path / name / "quant_monitor.csv").read_text().splitlines() for name in ("copies", "shards")]
        assert lines[0][0] == lines[1][0]
        assert len(lines[0]) == len(lines[1]) > 8


@two_ranks
def test_a_parameter_that_one_rank_does_not_use_is_trained_like_everywhere(tmp_path: Path) -> None:
    class Extra(CNN):
        def __init__(self) -> None:
            super().__init__("sgd")
            self.gain = nn.Parameter(torch.ones(3))
            self.unused = nn.Parameter(torch.ones(3))
            self.register_buffer("mask", torch.tensor([RANK == 0, False]))
            self.register_buffer("fine", torch.full((), 1.0 + RANK, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * self.gain if RANK == 0 else y

    _, trainer = run(tmp_path, Extra(), quantize=False, max_epochs=1)
    gain = trainer.lightning_module.gain.tolist()
    assert everyone(gain) == [gain, gain]
    assert gain != [1.0, 1.0, 1.0]
    assert trainer.lightning_module.unused.grad is None
    assert trainer.lightning_module.mask.tolist() == [True, False]
    assert trainer.lightning_module.fine.item() == 1.0


class Perceptron(Base):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x.flatten(1)))


class Divided(Perceptron):
    """Tensor parallel in its two linear layers."""

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


@two_ranks
def test_tensor_parallel_layers_are_possible_in_float(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_distributed_sampler": False}  # both ranks see all data
    skip = {"config": {"skip_layers": ["net.*"]}}
    expected, _ = run(tmp_path / "copies", Perceptron(), strategy="ascend", quantize=skip, **settings)
    strategy = AscendFSDPStrategy(tensor_parallel_size=2)
    losses, trainer = run(tmp_path / "parts", Divided(), strategy=strategy, quantize=skip, **settings)
    assert largest_difference(losses, expected) <= 1e-5
    assert list(quantized_layers(trainer.lightning_module)) == ["head"]
    with pytest.raises(ValueError, match=r"divided quantized layers .*: 'net\.0', 'net\.2'\."):
        run(tmp_path, Divided(), strategy=AscendFSDPStrategy(tensor_parallel_size=2), **settings)
    with pytest.raises(MisconfigurationException, match="Call parallelize_module in its configure_model"):
        run(tmp_path, Perceptron(), strategy=AscendFSDPStrategy(tensor_parallel_size=2), **settings)


class CountCollectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace in ("c10d", "_c10d_functional"):
            self.counts[name.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


class Counted(Transformer):
    """Counts the collectives of the last training step, with backward and optimizer."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with CountCollectives() as mode:
            super().optimizer_step(*args, **kwargs)
        self.counts = mode.counts


@two_ranks
def test_quantization_adds_one_collective_to_a_step(tmp_path: Path) -> None:
    counts = {}
    for quantize in (False, True):
        strategy = AscendFSDPStrategy(units=["TransformerEncoderLayer"])
        model = Counted()
        del model.position
        model.register_buffer("position", torch.zeros(16, 8))
        run(tmp_path, model, quantize=quantize, strategy=strategy)
        counts[quantize] = model.counts
    print("collectives per step", {key: dict(value) for key, value in counts.items()})
    assert counts[True] - counts[False] == Counter({"allreduce": 1})
    assert counts[False] - counts[True] == Counter()


@pytest.mark.npu(devices=1)
def test_one_device_trains_like_a_copy(tmp_path: Path) -> None:
    # Lightning shuffles the data of every training with a strategy that can be distributed
    losses, trainer = run(tmp_path, CNN(), devices=1, use_distributed_sampler=False)
    expected, _ = run(tmp_path, CNN(), devices=1, strategy="ascend")
    assert largest_difference(losses, expected) <= 1e-5
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = run(tmp_path, CNN(), devices=1, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert len(resumed) == 8


@pytest.mark.npu(devices=1)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path: Path) -> None:
    register()
    assert StrategyRegistry["ascend_fsdp"]["strategy"] is AscendFSDPStrategy
    for settings, message in (
        ({"units": "Block"}, "units='Block' is not valid"),
        ({"min_num_params": 0}, "min_num_params=0"),
        ({"hccl_connect_timeout": 0}, "hccl_connect_timeout=0"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            AscendFSDPStrategy(**settings)
    with pytest.raises(MisconfigurationException, match="64-true"):
        make_trainer(tmp_path, accelerator="npu", strategy="ascend_fsdp", devices=1, precision="64-true")
    with pytest.raises(MisconfigurationException, match="AscendFSDPStrategy trains on NPUs"):
        make_trainer(tmp_path, accelerator="cpu", strategy="ascend_fsdp", devices=1)
    with pytest.raises(MisconfigurationException, match="is not 1, the number of NPUs"):
        run(tmp_path, CNN(), devices=1, strategy=AscendFSDPStrategy(tensor_parallel_size=2))
    for averaging in (StochasticWeightAveraging(swa_lrs=0.01), WeightAveraging()):
        with pytest.raises(MisconfigurationException, match="Averaging keeps a copy of the whole model"):
            run(tmp_path, CNN(), devices=1, callbacks=[averaging])
