"""Networks and data of the examples for Ascend NPUs: handwritten digits that ship with scikit-learn.

Nothing here knows of NPUs or of quantization.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitsNet(pl.LightningModule):
    """A small CNN.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
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
        """Accuracy on held-out digits; a metric of torchmetrics counts over all cards."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


class Block(nn.Module):
    """Two layers and a shortcut around them.

    Args:
        width: Size of input and output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and what the layers add to it."""
        return x + self.down(self.up(self.norm(x)).relu())


class DeepNet(DigitsNet):
    """A network of blocks; nothing in it knows that it will be sharded.

    Args:
        width: Size of a block.
        depth: Number of blocks.
        lr: Learning rate.
    """

    def __init__(self, width: int = 128, depth: int = 4, lr: float = 2e-3) -> None:
        super().__init__(lr)
        blocks = (Block(width) for _ in range(depth))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), *blocks, nn.Linear(width, 10))


class DigitsData(pl.LightningDataModule):
    """1,797 digits of 8x8 pixels, 397 of them held out.

    Args:
        batch_size: Number of digits in a batch of one card; N cards learn from N times as many in a step.
    """

    def __init__(self, batch_size: int = 28) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load the digits; in every process."""
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        y = torch.tensor(digits.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(7))
        train, val = order[:1400], order[1400:]
        self.train, self.val = TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the digits to learn from; with more than one card, Lightning gives each a part of them."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out digits."""
        return DataLoader(self.val, 100)
