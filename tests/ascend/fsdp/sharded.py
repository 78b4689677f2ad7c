"""Models and runs for the tests of sharded training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import QuantMonitor, QuantRetrainCallback, quantized_layers
from tests.ascend.training import loader, make_trainer


class Base(pl.LightningModule):
    """Remembers its losses; the optimizer is a setting."""

    def __init__(self, optimizer: str = "adamw", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer, self.settings = optimizer, settings
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", functional.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, **self.settings)
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1, **self.settings)


def cnn_layers() -> nn.Sequential:
    """No biases before batch normalizations: their gradient is rounding noise, of which AdamW makes whole steps."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


class CNN(Base):
    """Two convolutions with batch normalization, and a linear layer."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.net = cnn_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Transformer(Base):
    """Two encoder layers between an embedding of pixels and a linear layer; one parameter of its own."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.embed = nn.Linear(2, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, 3)
        self.position = nn.Parameter(0.1 * torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(2).mT) + self.position
        return self.head(self.encoder(tokens).mean(1))


def run(
    folder: Path,
    model: Base,
    *,
    strategy: Any = "ascend_fsdp",
    quantize: Any = True,
    batches: int = 8,
    ckpt_path: Any = None,
    monitor: bool = False,
    **settings: Any,
) -> tuple[list[float], pl.Trainer]:
    """Train on two devices, validating too; the losses of the steps, and the trainer."""
    pl.seed_everything(0, verbose=False)
    callbacks: list[pl.Callback] = settings.pop("callbacks", [])
    if quantize:
        options = quantize if isinstance(quantize, dict) else {}
        callbacks = [QuantRetrainCallback(record_file=folder / "record.txt", **options), *callbacks]
    if monitor:
        callbacks = [*callbacks, QuantMonitor(every_n_steps=2, verbose=False)]
    defaults = {"accelerator": "npu", "devices": 2, "max_epochs": 2}
    trainer = make_trainer(folder, strategy=strategy, callbacks=callbacks, **{**defaults, **settings})
    trainer.fit(model, loader(batches), loader(2), ckpt_path=ckpt_path)
    return [loss.item() for loss in model.losses], trainer


def factors(model: nn.Module) -> dict[str, list[float]]:
    """Clips and scales of all layers, which every rank should have to the bit."""
    found: dict[str, list[float]] = {}
    for name, layer in quantized_layers(model).items():
        inputs, weights = layer.input_quantizer, layer.weight_quantizer
        found[name] = [inputs.clip_max.item(), inputs.clip_min.item(), *weights.scale.flatten().tolist()]
    return found
