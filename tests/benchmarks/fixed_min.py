"""What ``fixed_min: propagate`` gains over AMCT's rule: a small MobileNetV2 on handwritten digits, A4W4.

python -m tests.benchmarks.fixed_min
"""

from __future__ import annotations

import copy
import warnings
from itertools import chain, islice
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import calibrate, prepare_qat
from examples.digits_data import digits

SEEDS = (0, 1, 2)
FLOAT_EPOCHS, RETRAINING_EPOCHS, CALIBRATION_BATCHES = 8, 2, 4
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential(
            *_conv(inputs, width, 1),
            *_conv(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, with the input added if it has the same shape."""
        return x + self.body(x) if self.adds else self.body(x)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


def network(seed: int) -> nn.Sequential:
    """Return the float network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *_conv(1, 16, 3),
        Block(16, 16),
        Block(16, 24, stride=2),
        Block(24, 24),
        *_conv(24, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    )


def train(net: nn.Module, seed: int, epochs: int, rate: float) -> None:
    """Train, the learning rate going down to 0."""
    loader = digits(seed)[0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(net.train()(x), y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, seed: int) -> float:
    """Return how many of 100 held-out digits are read correctly."""
    x, y = next(iter(digits(seed)[1]))
    return 100 * float((net.eval()(x).argmax(1) == y).float().mean())


def measure(seed: int) -> dict[str, float]:
    """Return the accuracies by network."""
    float_net = network(seed)
    train(float_net, seed, FLOAT_EPOCHS, 3e-3)
    found = {"float": accuracy(float_net, seed)}
    for rule in ("after_relu", "propagate"):
        config = {
            "batch_num": CALIBRATION_BATCHES,
            "activations": {"dst_type": "INT4", "fixed_min": rule},
            "weights": {"dst_type": "INT4"},
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*INT8 is used instead of INT4")  # the stem and the depthwise layers
            net = prepare_qat(copy.deepcopy(float_net), config, EXAMPLE, execution="composite")
        batches = chain.from_iterable([digits(seed)[0]] * CALIBRATION_BATCHES)
        calibrate(net, islice((x for x, _ in batches), CALIBRATION_BATCHES))
        found[f"{rule}, not retrained"] = accuracy(net, seed)
        torch.manual_seed(seed)
        train(net, seed, RETRAINING_EPOCHS, 5e-4)
        found[f"{rule}, retrained"] = accuracy(net, seed)
    return found


def main() -> None:
    """Print the accuracies of each seed, and their means."""
    torch.set_num_threads(1)
    found = [measure(seed) for seed in SEEDS]
    for name in found[0]:
        each = [accuracies[name] for accuracies in found]
        print(f"{name:28}{mean(each):7.1f}   ({', '.join(f'{value:.1f}' for value in each)})")


if __name__ == "__main__":
    main()
