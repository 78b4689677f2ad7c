"""Trainings of layers whose activations have no range, or one around 0: schedules, checkpoints, records, monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amct_lightning import QuantMonitor, QuantRecord, QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.modules import quantized_layers
from tests.callbacks.conftest import TrainerFactory

CONFIGS: dict[str, dict[str, Any]] = {
    "per token": {"activations": {"algo": "per_token"}},
    "weights only": {"activations": {"algo": "none"}, "weights": {"algo": "ulq_retrain"}},
    "symmetric": {"activations": {"symmetric": True}},
    "mixed": {"activations": {"algo": "per_token"}, "layers": {"net.2": {"activations": {"algo": None}}}},
}
SCHEDULES: list[dict[str, Any]] = [{}, {"start": 1, "freeze_weights": 2}]


class Mlp(pl.LightningModule):
    """Three Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.example_input_array = torch.ones(2, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))), 8)


def fit(make_trainer: TrainerFactory, epochs: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> Any:
    trainer = make_trainer(max_epochs=epochs, callbacks=list(callbacks))
    trainer.fit(Mlp(), loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["at once", "scheduled"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_that_is_resumed_ends_as_one_without_a_break(
    make_trainer: TrainerFactory, tmp_path: Path, config: dict[str, Any], schedule: dict[str, Any]
) -> None:
    def callback() -> QuantRetrainCallback:
        return QuantRetrainCallback(config, schedule=schedule or None, quant_lr_scale=0.01)

    whole = fit(make_trainer, 3, callback())
    fit(make_trainer, 1, callback()).save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(make_trainer, 3, callback(), ckpt_path=tmp_path / "first.ckpt")
    state = whole.lightning_module.state_dict()
    for name, value in resumed.lightning_module.state_dict().items():
        assert torch.equal(value, state[name]), name
    whole.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Mlp, tmp_path / "last.ckpt").eval()
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), whole.lightning_module.eval()(x))
    record = QuantRecord.load(tmp_path / "last.record.txt")
    assert record == QuantRecord.from_model(loaded)
    assert len(record) == 3


def test_a_layer_runs_in_float_until_its_start(make_trainer: TrainerFactory) -> None:
    modes = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            modes.append({layer.quant_mode for layer in quantized_layers(pl_module).values()})

    fit(make_trainer, 2, QuantRetrainCallback(CONFIGS["per token"], schedule={"start": 1}), Look())
    assert modes == [{"float"}] * 4 + [{"quantized"}] * 4


@pytest.mark.parametrize("form", ["qdq", "deploy", "fake_quant"])
@pytest.mark.parametrize("name", ["per token", "weights only", "mixed"])
def test_an_export_is_refused_before_the_training(make_trainer: TrainerFactory, name: str, form: Any) -> None:
    model = Mlp()
    trainer = make_trainer(callbacks=[QuantRetrainCallback(CONFIGS[name], export=[form])])
    with pytest.raises(ValueError, match=r"'net\.0'.* Convert with algo: ulq_quantize for these layers"):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert not quantized_layers(model)


def test_an_export_of_symmetric_ranges_is_written_at_the_end(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    fit(make_trainer, 1, QuantRetrainCallback(CONFIGS["symmetric"], export=["qdq", "deploy"]))
    assert len(list(tmp_path.rglob("*.onnx"))) == 2


@pytest.mark.parametrize("name", ["per token", "weights only", "mixed"])
def test_the_monitor_shows_the_weights_of_layers_without_a_range(make_trainer: TrainerFactory, name: str) -> None:
    monitor = QuantMonitor(every_n_steps=2, verbose=False)
    fit(make_trainer, 2, QuantRetrainCallback(CONFIGS[name], schedule={"start": 1}), monitor)
    readings = {reading.layer: reading for reading in monitor.summary().readings}
    assert readings.keys() == {"net.0", "net.2", "net.4"}
    assert all(reading.sqnr_weight_db is not None for reading in readings.values())
    assert all(reading.weight_scale_drift is not None for reading in readings.values())
    ranged = {layer for layer, reading in readings.items() if reading.clip_max is not None}
    assert ranged == ({"net.2"} if name == "mixed" else set())
    assert {layer for layer, reading in readings.items() if reading.sqnr_input_db is not None} == ranged


def test_a_module_in_float_says_how_to_load_the_state(make_trainer: TrainerFactory) -> None:
    trainer = fit(make_trainer, 1, QuantRetrainCallback(CONFIGS["weights only"]))
    with pytest.raises(RuntimeError, match=r"load_qat_checkpoint\(Mlp, path\)"):
        Mlp().load_state_dict(trainer.lightning_module.state_dict())
