"""The data of the digits examples: 1,797 handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset


class EpochSampler(Sampler[int]):
    """Shuffle by seed and epoch alone, so that a resumed run sees the batches of an uninterrupted one.

    Lightning calls ``set_epoch`` before every epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the indices in the order of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self) -> int:
        """Number of samples."""
        return self.size


def digits(seed: int, batch_size: int = 32) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return a training loader (1,347 digits) and a test loader (450 digits) of 8x8 images in 0..1."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:450], order[450:]
    train_set = TensorDataset(images[train], labels[train])
    sampler = EpochSampler(len(train), seed)
    return (
        DataLoader(train_set, batch_size, sampler=sampler, drop_last=True),
        DataLoader(TensorDataset(images[test], labels[test]), 450),
    )


class DigitsData(pl.LightningDataModule):
    """The digits for a Trainer.

    Args:
        seed: Chooses the held-out digits, and the order of the others in every epoch.
        batch_size: Number of digits in a training batch.
    """

    def __init__(self, seed: int = 7, batch_size: int = 32) -> None:
        super().__init__()
        self.train, self.test = digits(seed, batch_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the digits to learn from."""
        return self.train

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out digits."""
        return self.test
