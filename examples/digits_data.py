"""The data and the network of the digits examples: 1,797 handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
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
