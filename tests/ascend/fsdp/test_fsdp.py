"""Training a sharded model equals training copies of it, step by step and in the record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from amct_lightning import QuantRecord
from amct_lightning.ascend import AscendFSDPStrategy
from tests.ascend.fsdp.sharded import CNN, Base, Transformer, factors, run
from tests.ascend.training import largest_difference

RANK = int(os.environ.get("RANK", "0"))

pytestmark = pytest.mark.npu(nproc=2)

ULQ = {"config": {"batch_num": 2, "weights": {"algo": "ulq_retrain"}}}


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tmp_path_factory.mktemp(f"copies{RANK}"), tmp_path_factory.mktemp(f"shards{RANK}")


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


def both(folders: tuple[Path, Path], make: Any, **settings: Any) -> Any:
    """Train with copies and with shards, check that it is the same training; the trainer with the shards."""
    sharded_strategy = settings.pop("sharded", "ascend_fsdp")
    expected, copies = run(folders[0], make(), strategy="ascend", **settings)
    losses, trainer = run(folders[1], make(), strategy=sharded_strategy, **settings)
    assert len(losses) >= 5
    assert largest_difference(losses, expected) <= 1e-5
    value = trainer.callback_metrics["val_loss"].item()
    assert value == pytest.approx(copies.callback_metrics["val_loss"].item(), abs=1e-5)
    if settings.get("quantize", True):
        first, second = everyone(factors(trainer.lightning_module))
        assert first == second
        if RANK == 0:
            expected_record, record = (QuantRecord.load(folder / "record.txt") for folder in folders)
            assert record.allclose(expected_record, rtol=1e-6), record.differences(expected_record, rtol=1e-6)
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", [CNN, Transformer])
def test_losses_and_record_are_those_of_copies(folders: tuple[Path, Path], model: type[Base], optimizer: str) -> None:
    trainer = both(folders, lambda: model(optimizer))
    parameters = dict(trainer.lightning_module.named_parameters())
    whole = {name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)}
    assert {name for name in whole if "_quantizer." not in name} <= {"position"}
    assert any("clip_max" in name for name in whole)
    assert all(p.to_local().numel() < p.numel() for p in parameters.values() if isinstance(p, DTensor) and p.dim() > 1)
    if RANK == 0 and model is CNN:
        assert (folders[0] / "record.txt").read_bytes() == (folders[1] / "record.txt").read_bytes()
    else:
        assert not (folders[1] / "record.txt").exists() or RANK == 0


def test_learned_weight_scales_stay_whole_and_are_trained_alike(folders: tuple[Path, Path]) -> None:
    trainer = both(folders, CNN, quantize=ULQ)
    scale = trainer.lightning_module.net[0].weight_quantizer.scale
    assert isinstance(scale, torch.nn.Parameter)
    assert not isinstance(scale, DTensor)
    assert scale.shape == (6,)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients_are_those_of_the_whole_model(folders: tuple[Path, Path], algorithm: str) -> None:
    limit = {"norm": 0.3, "value": 0.01}[algorithm]
    trainer = both(folders, lambda: CNN("sgd"), gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    unclipped, _ = run(folders[1], CNN("sgd"))
    clipped = [loss.item() for loss in trainer.lightning_module.losses]
    assert clipped[0] == unclipped[0]  # before the first update
    assert largest_difference(clipped, unclipped) > 1e-3  # the limit was reached


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_optimizers_update_shards_and_whole_parameters(folders: tuple[Path, Path], options: dict[str, bool]) -> None:
    trainer = both(folders, lambda: CNN("adamw", **options), quantize=ULQ)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.0]


def test_batch_normalization_can_be_synchronised(folders: tuple[Path, Path]) -> None:
    trainer = both(folders, lambda: CNN("sgd"), sync_batchnorm=True)
    assert isinstance(trainer.lightning_module.net[1], torch.nn.SyncBatchNorm)


def test_gradients_accumulate(folders: tuple[Path, Path]) -> None:
    # Copies add gradients before they exchange them, shards after it: another order of sums. Learned weight scales
    # would make whole steps of its last bits, on some CPUs, wherever a weight is near a tie.
    trainer = both(folders, CNN, accumulate_grad_batches=3, max_epochs=3)
    assert len(trainer.lightning_module.losses) == 12
    assert trainer.global_step == 6  # after 3 batches, and after the one that is left of each epoch


def test_units_by_class_name_size_and_function(folders: tuple[Path, Path]) -> None:
    by_name = AscendFSDPStrategy(units=["TransformerEncoderLayer"])
    trainer = both(folders, lambda: Transformer("sgd"), sharded=by_name)
    model = trainer.lightning_module
    units = [name for name, module in model.named_modules() if hasattr(module, "unshard")]
    assert units == ["embed", "encoder", "encoder.layers.0", "encoder.layers.1", "head"]
    both(folders, lambda: Transformer("sgd"), sharded=AscendFSDPStrategy(units=lambda name, _: "norm" in name))
