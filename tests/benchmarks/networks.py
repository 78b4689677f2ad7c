"""Networks that a user knows, small enough for a CPU, each with a batch of data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A classifier, what it is called in tables, and a batch of its inputs."""

    title: str
    model: nn.Module
    x: Tensor


class Residual(nn.Module):
    """What a branch makes of its input, added to it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


def norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def resnet18(width: int = 16) -> nn.Module:
    """ResNet-18 with the stem that small images have."""
    layers: list[nn.Module] = [norm_conv(3, width, 3), nn.ReLU()]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        for step in (stride, 1):
            branch = nn.Sequential(norm_conv(inputs, outputs, 3, step), nn.ReLU(), norm_conv(outputs, outputs, 3))
            same = step == 1 and inputs == outputs
            shortcut = nn.Identity() if same else norm_conv(inputs, outputs, 1, step)
            layers.append(Residual(branch, shortcut, nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers, classifier(inputs))


def inverted(inputs: int, outputs: int, stride: int, wider: int = 6) -> nn.Module:
    """An inverted residual of MobileNetV2."""
    wide = wider * inputs
    widening = [norm_conv(inputs, wide, 1), nn.ReLU6()] if wider > 1 else []
    depthwise = norm_conv(wide, wide, 3, stride, groups=wide)
    block = nn.Sequential(*widening, depthwise, nn.ReLU6(), norm_conv(wide, outputs, 1))
    same = stride == 1 and inputs == outputs
    return Residual(block, nn.Identity(), nn.Identity()) if same else block


def mobilenet(width: int = 16) -> nn.Module:
    """Inverted residuals as in MobileNetV2, with half of its widths and two blocks for each."""
    layers: list[nn.Module] = [norm_conv(3, width, 3), nn.ReLU6()]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (3 * width, 2), (5 * width, 1)):
        for step in (stride, 1):
            layers.append(inverted(inputs, outputs, step))
            inputs = outputs
    return nn.Sequential(*layers, classifier(inputs))


def mobilenet_v2() -> nn.Module:
    """The whole MobileNetV2: 17 blocks, of the widths in its paper."""
    layers: list[nn.Module] = [norm_conv(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for wider, outputs, blocks, stride in table:
        for block in range(blocks):
            layers.append(inverted(inputs, outputs, 1 if block else stride, wider))
            inputs = outputs
    return nn.Sequential(*layers, norm_conv(inputs, 1280, 1), nn.ReLU6(), classifier(1280))


def mlp(inputs: int = 784, width: int = 512, depth: int = 3, classes: int = CLASSES) -> nn.Module:
    sizes = [inputs, *[width] * depth]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Attention(nn.Module):
    """Self-attention, its projections as linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """The two linear layers of a transformer's block."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class ViT(nn.Module):
    """A vision transformer with the width of ViT-Tiny, over patches of 4 x 4 pixels."""

    def __init__(self, width: int = 192, heads: int = 3, depth: int = 4, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn((size // 4) ** 2, width))
        blocks: list[nn.Module] = []
        for _ in range(depth):
            attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
            linear = nn.Sequential(nn.LayerNorm(width), *feed_forward(width))
            blocks += [Residual(part, nn.Identity(), nn.Identity()) for part in (attention, linear)]
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Bert(nn.Module):
    """An encoder as BERT is, of the size that is known as BERT-Mini, which judges a sequence by its first token."""

    def __init__(self, width: int = 256, heads: int = 4, depth: int = 4, length: int = 128, words: int = 8192) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(
                Residual(part, nn.Identity(), nn.LayerNorm(width))
                for _ in range(depth)
                for part in (Attention(width, heads), feed_forward(width))
            )
        )
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.norm(self.words(x) + self.places))
        return self.head(self.pooler(tokens[:, 0]).tanh())


class SequenceLSTM(nn.Module):
    """An LSTM that reads a sequence, and a linear layer that judges its last output."""

    def __init__(self, inputs: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(inputs, hidden, batch_first=True), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def networks() -> dict[str, Network]:
    """Return the networks by name."""
    images = torch.randn(32, 3, 32, 32)
    return {
        "resnet": Network("ResNet-18 of a quarter of the width, 32 images of 32x32", resnet18(), images),
        "mobilenet": Network("MobileNetV2 of half the width, 8 blocks, 32 images of 32x32", mobilenet(), images),
        "mlp": Network("MLP 784-512-512-512-10, batch 256", mlp(), torch.randn(256, 784)),
        "vit": Network("ViT 192 wide, 4 blocks, 16 images of 64 patches", ViT(), images[:16]),
        "lstm": Network("LSTM 128 wide, 32 sequences of 64 steps", SequenceLSTM(), torch.randn(32, 64, 32)),
    }
