"""The network of the digits examples, and the LightningModule around it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy


def depthwise_separable(cin: int, cout: int, stride: int) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise convolution, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(cin, cin, 3, stride, padding=1, groups=cin, bias=False),
        nn.BatchNorm2d(cin),
        nn.ReLU(),
        nn.Conv2d(cin, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    )


def network(width: int = 12, blocks: int = 10) -> nn.Sequential:
    """A narrow, deep depthwise-separable CNN for 8x8 images: the kind that plain INT4 quantization hurts."""
    middle = blocks // 2
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(depthwise_separable(width, width, stride=2 if block == middle else 1) for block in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class Digits(pl.LightningModule):
    """An ordinary LightningModule; it knows nothing of quantization.

    Args:
        lr: Learning rate at the start of the cosine schedule.
    """

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = network()
        self.lr = lr
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on held-out digits."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a cosine schedule over the whole training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs),
        }
