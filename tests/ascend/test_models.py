"""Whole networks learn to be quantized on the NPU as they do on the CPU: equal losses, and records equal to the byte.

For a model with attention the CPU is told to compute it by the formula, as the simulated device does. Its fused kernel
adds up in another order; the last bit of an activation then decides to which side it is rounded, and one rounding that
turns out otherwise changes the loss of so small a model by more than 1e-5.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from amct_lightning import QuantRecord, QuantRetrainCallback
from tests.architectures.models import ARCHITECTURES, Architecture
from tests.ascend.training import CPU, NPU, largest_difference, make_trainer

pytestmark = pytest.mark.npu

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 5


class Wrapped(pl.LightningModule):
    """A model of the transformers library, trained on its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        output = self(**batch)
        loss = output.get("loss")
        return output.logits.square().mean() + output.pred_boxes.mean() if loss is None else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Losses(pl.Callback):
    """Where the steps happened, and their losses."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].detach())

    def on(self, device: str) -> list[float]:
        assert {value.device for value in self.values} == {torch.device(device)}
        return [value.item() for value in self.values]


def without_dropout(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Random numbers of two devices differ."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def train(folder: Path, model: pl.LightningModule, data: Any, callback: QuantRetrainCallback, where: Any) -> Losses:
    losses = Losses()
    trainer = make_trainer(folder, max_steps=STEPS, callbacks=[callback, losses], **where)
    with sdpa_kernel(SDPBackend.MATH):
        trainer.fit(model, data)
    return losses


def train_architecture(folder: Path, architecture: Architecture, where: dict[str, Any]) -> Losses:
    torch.manual_seed(0)
    kind = getattr(transformers, architecture.model)
    model = kind(without_dropout(kind.config_class(**architecture.config)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = [architecture.inputs() for _ in range(STEPS)]
    record = folder / f"{where['accelerator']}.txt"
    callback = QuantRetrainCallback({"batch_num": 2}, record, input_data=batches[0])
    return train(folder, Wrapped(model), DataLoader(batches, batch_size=None), callback, where)


def check_equal(folder: Path, on_cpu: Losses, on_npu: Losses) -> None:
    assert len(set(on_cpu.on("cpu"))) == STEPS
    assert largest_difference(on_cpu.on("cpu"), on_npu.on("npu:0")) <= 1e-5
    assert QuantRecord.load(folder / "npu.txt")
    assert (folder / "npu.txt").read_bytes() == (folder / "cpu.txt").read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_models_of_the_transformers_library_learn_as_on_the_cpu(tmp_path: Path, architecture: Architecture) -> None:
    """Two batches calibrate, three teach."""
    check_equal(tmp_path, *(train_architecture(tmp_path, architecture, where) for where in (CPU, NPU)))


@pytest.mark.parametrize("bits", ["INT8", "INT4"])
def test_the_digits_learn_as_on_the_cpu(tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo, data, module = (importlib.import_module(name) for name in ("digits", "digits_data", "digits_model"))
    losses = []
    for where in (CPU, NPU):
        pl.seed_everything(7, verbose=False)
        model = module.Digits(lr=6e-3)
        config = demo.int4_config(model) if bits == "INT4" else None
        callback = QuantRetrainCallback(config, tmp_path / f"{where['accelerator']}.txt")
        losses.append(train(tmp_path, model, data.DigitsData(7), callback, where))
    check_equal(tmp_path, *losses)
