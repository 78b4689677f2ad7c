"""The layers and widths that every QAT layer test runs through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, prepare_qat
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig


@dataclass(frozen=True)
class LayerCase:
    """A layer type with a way of calling it; weights can be packed as INT4 unless ``int4`` is false."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)
    int4: bool = True

    def input(self) -> Tensor:
        return torch.randn(self.shape)

    def model(self) -> Host:
        return Host(self.make(), self.call)


class Host(nn.Module):
    """A model of one layer, so that conversion has something to replace it in."""

    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.call)


@dataclass(frozen=True)
class Width:
    """The types of activations and weights."""

    activations: int
    weights: int

    def __str__(self) -> str:
        return f"A{self.activations}W{self.weights}"

    def config(self, name: str = "layer") -> RetrainConfig:
        layer = LayerConfig(
            retrain_data_config=DataConfig(dst_type=f"INT{self.activations}"),
            retrain_weight_config=WeightConfig(dst_type=f"INT{self.weights}"),
        )
        return RetrainConfig(layers={name: layer})


LAYERS = [
    LayerCase("conv", lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    LayerCase("conv_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), int4=False),
    LayerCase("conv_depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 7), int4=False),
    LayerCase("conv_stride", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    LayerCase("conv_same", lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 7)),
    LayerCase("linear", lambda: nn.Linear(8, 5), (3, 8)),
    LayerCase("linear_3d", lambda: nn.Linear(8, 5, bias=False), (2, 3, 8)),
    LayerCase("linear_1d", lambda: nn.Linear(8, 5), (8,)),
    LayerCase("deconv", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    LayerCase("deconv_grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), int4=False),
    LayerCase(
        "deconv_output_size",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        (2, 4, 5, 5),
        {"output_size": [10, 10]},
    ),
]
WIDTHS = [Width(8, 8), Width(16, 8), Width(8, 4), Width(4, 4)]
COMBINATIONS = [(layer, width) for layer in LAYERS for width in WIDTHS if layer.int4 or width.weights == 8]


@dataclass
class Converted:
    """A calibrated model of one QAT layer, the float model it was made from, and an input."""

    case: LayerCase
    width: Width
    float_model: Host
    model: Host
    x: Tensor

    @property
    def layer(self) -> Any:
        return self.model.layer


def converted(case: LayerCase, width: Width = WIDTHS[0]) -> Converted:
    torch.manual_seed(0)
    float_model, x = case.model(), case.input()
    model = prepare_qat(float_model, width.config(), x).train()
    model(x)  # calibrates
    return Converted(case, width, float_model, model, x)
