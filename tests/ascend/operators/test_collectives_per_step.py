"""A step of a quantized model has the collectives of the float model's step, and no more; over HCCL on two NPUs."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed import _compute_bucket_assignment_by_size as assign_buckets
from torch.utils._python_dispatch import TorchDispatchMode

from amct_lightning import QuantMonitor, QuantRetrainCallback, RetrainConfig, prepare_qat
from amct_lightning.ascend import AscendFSDPStrategy, AscendStrategy
from amct_lightning.modules import activation_quantizers, learned_factors
from tests.ascend.operators.tracing import DeviceTrace
from tests.ascend.training import Net, loader, make_trainer

two_ranks = pytest.mark.npu(nproc=2)

STEPS = 6
CALIBRATION = 0
STEADY = range(2, STEPS - 1)  # DDP has arranged its buckets anew after the first step
ADDED = {"32-true": 0, "bf16-mixed": 0, "bf16-true": 1}
"""Precision -> collectives that quantization adds: float32 factors cannot share a bucket with bfloat16 weights."""


LIGHTNINGS_OWN = {"lightning/pytorch/loops/training_epoch_loop.py:_broadcast_sigterm_tensor": 2}
"""With several processes Lightning 2.6 tells all ranks after every batch whether one was asked to end, and reads it."""


class Mlp(Net):
    """Linear layers only: no buffers in float, so that DDP has nothing to broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


MODELS: dict[str, type[Net]] = {"conv with batch norm": Net, "linear": Mlp}


@dataclass
class Collectives:
    """What the processes exchange in a batch: (operator, dtype) -> number of calls, and bytes of all reductions."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    reduced: int = 0
    sequence: int = 0


class Count(TorchDispatchMode):
    """Counts the collectives of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Collectives] = []
        self.current = Collectives()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = list(_tensors(args))
            self.current.calls[func.name(), str(tensors[0].dtype)] += 1
            if "reduce" in func.name():
                self.current.reduced += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


class Mark(pl.Callback):
    """Tells the counter where batches begin and end; HCCL's own count of collectives goes along."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def on_train_batch_start(self, *args: Any) -> None:
        self.count.current = Collectives(sequence=_sequence_number())
        self.count.batches.append(self.count.current)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.count.current = Collectives(sequence=_sequence_number())


def _sequence_number() -> int:
    return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def count(
    folder: Path, kind: type[Net], callbacks: list[pl.Callback], strategy: Any = None, **settings: Any
) -> tuple[list[Collectives], Net]:
    """Train on both devices; the collectives of every batch, and the model."""
    counter, model = Count(), kind()
    settings |= {"accelerator": "npu", "devices": 2, "strategy": strategy or AscendStrategy(), "max_epochs": 1}
    with counter:
        make_trainer(folder, callbacks=[*callbacks, Mark(counter)], **settings).fit(model, loader(2 * STEPS))
    assert len(counter.batches) == STEPS
    return counter.batches, model


def learned(kind: type[Net]) -> RetrainConfig:
    """Weight scales that are learned too."""
    config = RetrainConfig.default(kind().net, torch.ones(2, 2, 4, 4)).to_dict()
    layers = copy.deepcopy({name: layer for name, layer in config.items() if isinstance(layer, dict)})
    for layer in layers.values():
        layer["retrain_weight_config"]["algo"] = "ulq_retrain"
    return RetrainConfig.from_dict({**config, **layers})


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@two_ranks
@pytest.mark.parametrize("precision", ADDED)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_no_more_collectives_than_that_of_the_float_model(folder: Path, name: str, precision: Any) -> None:
    kind = MODELS[name]
    floating, _ = count(folder, kind, [], precision=precision)
    callback = QuantRetrainCallback(record_file=folder / "r.txt")
    quantized, model = count(folder, kind, [callback], precision=precision)
    factors = sum(p.numel() * 4 for p in learned_factors(model))
    for step in STEADY:
        added = quantized[step].calls - floating[step].calls
        assert added == Counter({("c10d::allreduce_", "torch.float32"): ADDED[precision]})
        assert floating[step].calls - quantized[step].calls == Counter()
        assert quantized[step].reduced - floating[step].reduced == factors
        between = quantized[step + 1].sequence - quantized[step].sequence
        assert between == quantized[step].calls.total() > 0  # nothing has passed the counter by


@two_ranks
def test_a_part_that_is_quantized_alone_adds_no_collective(folder: Path) -> None:
    floating, _ = count(folder, Mlp, [])
    callback = QuantRetrainCallback(record_file=folder / "r.txt", submodule="net", input_data=torch.ones(2, 2, 4, 4))
    quantized, _ = count(folder, Mlp, [callback])
    assert [quantized[step].calls for step in STEADY] == [floating[step].calls for step in STEADY]


@two_ranks
def test_the_end_of_the_calibration_has_one_collective_more(folder: Path) -> None:
    floating, _ = count(folder, Net, [])
    quantized, model = count(folder, Net, [QuantRetrainCallback(record_file=folder / "r.txt")])
    added = quantized[CALIBRATION].calls - floating[CALIBRATION].calls
    assert added == Counter({("c10d::allreduce_", "torch.float32"): 1})
    bytes_of_ranges = 5 * 4 * len(activation_quantizers(model))  # both clips; whether new, degenerate, ever reached
    factors = sum(p.numel() * 4 for p in learned_factors(model))
    assert quantized[CALIBRATION].reduced - floating[CALIBRATION].reduced == bytes_of_ranges + factors


@two_ranks
def test_learned_weight_scales_travel_with_the_gradients(folder: Path) -> None:
    floating, _ = count(folder, Net, [])
    callback = QuantRetrainCallback(learned(Net), folder / "r.txt", submodule="net")
    quantized, model = count(folder, Net, [callback])
    assert sum(p.numel() for p in learned_factors(model)) == 4 + 4 + 1  # clips, scales of 4 channels, one scale
    for step in STEADY:
        assert quantized[step].calls["c10d::allreduce_", "torch.float32"] == 1
        assert quantized[step].reduced - floating[step].reduced == 4 * 9


@two_ranks
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "32-true") for name in MODELS), ("linear", "bf16-mixed"), ("linear", "bf16-true")]
)
def test_a_sharded_step_has_one_collective_more_for_all_factors(folder: Path, name: str, precision: Any) -> None:
    kind = MODELS[name]
    floating, _ = count(folder, kind, [], AscendFSDPStrategy(min_num_params=8), precision=precision)
    callback = QuantRetrainCallback(record_file=folder / "r.txt")
    quantized, model = count(folder, kind, [callback], AscendFSDPStrategy(min_num_params=8), precision=precision)
    once = Counter({("c10d::allreduce_", "torch.float32"): 1})
    for step in STEADY:
        assert quantized[step].calls - floating[step].calls == once
        assert floating[step].calls - quantized[step].calls == Counter()
        flagged = sum(4 * (p.numel() + 1) for p in learned_factors(model))
        assert quantized[step].reduced - floating[step].reduced == flagged
    assert quantized[CALIBRATION].calls - floating[CALIBRATION].calls == once + once


@two_ranks
def test_a_monitor_exchanges_its_three_statistics_once_per_interval(folder: Path) -> None:
    retrain = QuantRetrainCallback(record_file=folder / "r.txt")
    monitor = QuantMonitor(every_n_steps=STEADY[-1] + 1, verbose=False)
    without, _ = count(folder, Net, [retrain])
    monitored, _ = count(folder, Net, [QuantRetrainCallback(record_file=folder / "r.txt"), monitor])
    added = [after.calls - before.calls for before, after in zip(without, monitored, strict=True)]
    per_statistic = {("c10d::barrier", "torch.uint8"), ("c10d::allgather_", "torch.int64")}
    assert added[STEADY[-1]] == Counter(dict.fromkeys({*per_statistic, ("c10d::allgather_", "torch.float32")}, 3))
    assert all(added[step] == Counter() for step in STEADY[:-1])


@two_ranks
def test_several_processes_read_the_device_once_more_at_the_end_of_the_calibration(folder: Path) -> None:
    floating, quantized = waits(folder, []), waits(folder, [QuantRetrainCallback(record_file=folder / "r.txt")])
    assert quantized[CALIBRATION]["amct_lightning/modules/calibration.py:synchronize_calibration"] == 1
    for step in STEADY:
        assert quantized[step] == floating[step] == LIGHTNINGS_OWN


def waits(folder: Path, callbacks: list[pl.Callback]) -> dict[int, Counter[str]]:
    """Where the host waits for the device in each batch."""
    trace = DeviceTrace("setup")

    class Phase(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            trace.phase = str(args[-1])

        def on_train_epoch_end(self, *args: Any) -> None:
            trace.phase = "end"

    settings: dict[str, Any] = {"accelerator": "npu", "devices": 2, "strategy": AscendStrategy(), "max_epochs": 1}
    with trace:
        make_trainer(folder, callbacks=[Phase(), *callbacks], **settings).fit(Net(), loader(2 * STEPS))
    assert trace.operators("fallbacks") == set()
    return {step: Counter(wait.where for wait in trace.waits if wait.phase == str(step)) for step in range(STEPS)}


RESNET50: dict[str, Any] = {"name": "ResNetForImageClassification", "config": {"num_labels": 1000}}
BERT_BASE: dict[str, Any] = {"name": "BertForSequenceClassification", "config": {}}


@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize(("network", "buckets"), [(RESNET50, 5), (BERT_BASE, 14)], ids=["resnet50", "bert_base"])
def test_networks_of_full_size_keep_their_number_of_gradient_buckets(
    network: dict[str, Any], buckets: int, algo: str
) -> None:
    """By DDP's own rule: in the order of the backward pass, the first bucket of 1 MiB, the others of 25 MiB."""
    kind = getattr(transformers, network["name"])
    with torch.device("meta"):  # without values, so it costs nothing
        floating = kind(kind.config_class(**network["config"]))
        is_image = kind.main_input_name == "pixel_values"
        x = torch.zeros(1, 3, 224, 224) if is_image else torch.zeros(1, 8, dtype=torch.long)
        quantized = prepare_qat(floating, {"weights": {"algo": algo}}, {kind.main_input_name: x})
    assert len(learned_factors(quantized)) >= 100
    assert bucket_count(floating) == bucket_count(quantized) == buckets


def bucket_count(model: nn.Module) -> int:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return len(assign_buckets(parameters[::-1], [1 << 20, 25 << 20], [False] * len(parameters))[0])
