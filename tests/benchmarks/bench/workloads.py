"""What is trained: networks with a batch each, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.benchmarks.networks import Bert, SequenceLSTM, ViT, mlp, mobilenet_v2, resnet18
from tests.benchmarks.recurrent import FloatLoop


@dataclass(frozen=True)
class Workload:
    """A network and a batch, made when they are asked for.

    Attributes:
        title: What it is called in tables.
        model: Makes the float network.
        batch: Makes a batch of inputs.
        loop: Makes the float network with a loop over an unfused cell for its recurrent layer, if it has one.
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    loop: Callable[[], nn.Module] | None = None


class LoopLSTM(nn.Module):
    """What ``SequenceLSTM`` computes, step by step as a quantized LSTM has to."""

    def __init__(self, inputs: int = 32, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.rnn, self.head = FloatLoop(nn.LSTM, inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[-1])


def images(count: int, size: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, 3, size, size)


WORKLOADS = {
    "resnet18-w16": Workload("ResNet-18, 16 channels wide, 64 images of 32x32", resnet18, images(64)),
    "resnet18-w64": Workload("ResNet-18, 64 channels wide, 16 images of 32x32", lambda: resnet18(64), images(16)),
    "mobilenet-v2": Workload("MobileNetV2, 32 images of 64x64", mobilenet_v2, images(32, 64)),
    "vit": Workload("ViT, 192 wide, 6 blocks, 32 images of 64 patches", lambda: ViT(depth=6), images(32)),
    "bert": Workload(
        "BERT-like, 256 wide, 4 blocks, 16 sequences of 128 tokens", Bert, lambda: torch.randint(8192, (16, 128))
    ),
    "mlp": Workload(
        "MLP, 6 layers of 512, batch 2048",
        lambda: mlp(512, depth=5, classes=512),
        lambda: torch.randn(2048, 512),
    ),
    "lstm": Workload(
        "LSTM, 128 wide, 32 sequences of 64 steps", SequenceLSTM, lambda: torch.randn(32, 64, 32), LoopLSTM
    ),
}
"""What is measured if nothing else is asked for."""

TINY = {
    "tiny": Workload("MLP 16-8-10, batch 4", lambda: mlp(16, 8, 1), lambda: torch.randn(4, 16)),
    "tiny-lstm": Workload(
        "LSTM, 4 wide, 2 sequences of 3 steps",
        lambda: SequenceLSTM(4, 4),
        lambda: torch.randn(2, 3, 4),
        lambda: LoopLSTM(4, 4),
    ),
}
"""Networks that say nothing about speed; with them one sees in seconds whether everything works."""
