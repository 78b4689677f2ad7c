"""Training step of quantized networks against the float ones: time, operators, host reads, bytes kept for backward.

python -m tests.benchmarks.step_time
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, calibrate, prepare_qat
from tests.benchmarks.timing import medians
from tests.operators import Operators


def resnet(width: int = 32, blocks: int = 6) -> nn.Module:
    """Convolutions, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def mlp(width: int = 512, depth: int = 6) -> nn.Module:
    """Linear layers with GELU."""
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())))


def saved_bytes(step: Callable[[], object]) -> int:
    """Return how many bytes of distinct storages autograd keeps for backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def main() -> None:
    """Print one line per network and variant."""
    for name, net, x in (
        ("convolutions, batch 32, 32x32", resnet(), torch.randn(32, 3, 32, 32)),
        ("linear, batch 1024", mlp(), torch.randn(1024, 512)),
    ):
        learned = RetrainConfig.default(net, x).to_dict()
        for settings in learned.values():
            if isinstance(settings, dict):
                settings["retrain_weight_config"]["algo"] = "ulq_retrain"
        models = {
            "float": copy.deepcopy(net),
            "arq_retrain": prepare_qat(net, None, x),
            "ulq_retrain": prepare_qat(net, learned, x),
        }
        for variant in ("arq_retrain", "ulq_retrain"):
            calibrate(models[variant], [x])
        steps = {variant: _step(model.train(), x) for variant, model in models.items()}
        times = medians(steps)
        for variant, step in steps.items():
            with Operators() as operators:
                step()
            print(
                f"{name}: {variant} {times[variant] / times['float']:.2f}x ({1000 * times[variant]:.1f} ms), "
                f"{sum(operators.counts.values())} operators, "
                f"{sum(operators.host_reads.values())} host reads, "
                f"{saved_bytes(step) / saved_bytes(steps['float']):.2f}x bytes kept for backward"
            )


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: model(x).square().mean().backward()


if __name__ == "__main__":
    main()
