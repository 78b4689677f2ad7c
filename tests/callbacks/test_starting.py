"""Trainings whose scales and ranges start from a search of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from amct_lightning import QuantMonitor, QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.modules import quantized_layers
from tests.callbacks.conftest import TrainerFactory
from tests.callbacks.test_rangeless import Mlp, fit

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "output": {"init": "output"},
    "percentile": {"init": "percentile", "percentile": 99},
    "symmetric": {"init": "output", "symmetric": True},
}
SCHEDULES: list[dict[str, Any]] = [{}, {"start": 1, "freeze_weights": 2}]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["at once", "scheduled"])
@pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_training_that_is_resumed_ends_as_one_without_a_break(
    make_trainer: TrainerFactory, tmp_path: Path, activations: dict[str, Any], algo: str, schedule: dict[str, Any]
) -> None:
    weights = {"algo": algo, "init": "mse", "dst_type": "INT4", "group_size": 32 if algo == "ulq_retrain" else None}
    config: dict[str, Any] = {"batch_num": 2, "activations": activations, "weights": weights}
    config["layers"] = {f"net.{i}": {"weights": {"group_size": None}} for i in (2, 4)}

    def callbacks() -> list[pl.Callback]:
        return [
            QuantRetrainCallback(config, schedule=schedule or None, quant_lr_scale=0.01),
            QuantMonitor(every_n_steps=2, verbose=False),
        ]

    whole = fit(make_trainer, 3, *callbacks())
    fit(make_trainer, 1, *callbacks()).save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(make_trainer, 3, *callbacks(), ckpt_path=tmp_path / "first.ckpt")
    state = whole.lightning_module.state_dict()
    for name, value in resumed.lightning_module.state_dict().items():
        assert torch.equal(value, state[name]), name
    for layer in quantized_layers(whole.lightning_module).values():
        assert not layer.weight_quantizer.starting  # type: ignore[union-attr]
    whole.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Mlp, tmp_path / "last.ckpt").eval()
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), whole.lightning_module.eval()(x))
    assert QuantRecord.load(tmp_path / "last.record.txt") == QuantRecord.from_model(loaded)
