"""What the callbacks and the room for Ascend ask of each other: those who are asked have it, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn

from amct_lightning import AscendFSDPStrategy, AscendStrategy, prepare_qat
from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.checkpoints.io import AtomicCheckpointIO, RecordCheckpointIO
from amct_lightning.callbacks.checkpoints.records import RecordFile
from amct_lightning.callbacks.checkpoints.state import QuantState
from amct_lightning.protocols import KeepsWhole, ShardingStrategy, WrappingCheckpointIO


def test_the_strategy_that_shards_converted_layers() -> None:
    strategy = AscendFSDPStrategy()
    assert isinstance(strategy, ShardingStrategy)
    assert strategy.shards_in_configure_model


@pytest.mark.parametrize("strategy", [AscendStrategy(), ModelParallelStrategy()])
def test_strategies_that_do_not(strategy: Strategy) -> None:
    assert not isinstance(strategy, ShardingStrategy)


def test_the_checkpoint_io_with_another_one_inside(tmp_path: Path) -> None:
    record = RecordFile(tmp_path / "record.txt", is_written=True)
    state = QuantState(nn.Linear(2, 2), None, record, CalibrationCount(), is_configured=False, is_fitting=True)
    io = RecordCheckpointIO(TorchCheckpointIO(), state)
    assert isinstance(io, WrappingCheckpointIO)
    assert isinstance(io.inner, AtomicCheckpointIO)
    assert not isinstance(io.inner, WrappingCheckpointIO)


def test_the_modules_that_stay_whole() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(2, 2)), None, torch.ones(1, 2))
    whole = {name for name, module in model.named_modules() if isinstance(module, KeepsWhole) and module.keeps_whole}
    assert whole == {"0.input_quantizer", "0.weight_quantizer"}
