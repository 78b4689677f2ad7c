"""The layers, algorithms and widths that every QAT layer test runs through."""

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

    @property
    def recurrent(self) -> bool:
        return isinstance(self.make(), nn.RNNBase)

    @property
    def time_first(self) -> bool:
        return self.recurrent and not self.make().batch_first

    @property
    def batch_axis(self) -> int:
        return 1 if self.time_first else 0


class Host(nn.Module):
    """A model of one layer, so that conversion has something to replace it in."""

    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, **self.call)
        return y[0] if isinstance(y, tuple) else y


@dataclass(frozen=True)
class Width:
    """The types of activations and weights, the algorithms of both, and whether weights have a scale per channel."""

    activations: int = 8
    weights: int = 8
    algo: str = "arq_retrain"
    channel_wise: bool | None = None
    input: str = "ulq_quantize"
    symmetric: bool = False

    def __str__(self) -> str:
        scales = {None: "", True: "-channel", False: "-tensor"}[self.channel_wise]
        of_input = "-symmetric" if self.symmetric else f"-{self.input}" if self.input != "ulq_quantize" else ""
        return f"A{self.activations}W{self.weights}-{self.algo[:3]}{scales}{of_input}"

    @property
    def learned(self) -> bool:
        return self.algo == "ulq_retrain"

    def config(self, name: str = "layer") -> RetrainConfig:
        layer = LayerConfig(
            retrain_data_config=DataConfig(self.input, dst_type=f"INT{self.activations}", symmetric=self.symmetric),
            retrain_weight_config=WeightConfig(self.algo, self.channel_wise, f"INT{self.weights}"),
        )
        return RetrainConfig(layers={name: layer})


LAYERS = [
    LayerCase("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    LayerCase("conv1d_grouped", lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), int4=False),
    LayerCase("conv", lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    LayerCase("conv_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), int4=False),
    LayerCase("conv_depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 7), int4=False),
    LayerCase("conv_stride", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    LayerCase("conv_same", lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 7)),
    LayerCase("conv3d", lambda: nn.Conv3d(4, 6, 2, dilation=(1, 2, 1)), (2, 4, 3, 4, 4)),
    LayerCase("conv3d_depthwise", lambda: nn.Conv3d(4, 4, 2, groups=4), (2, 4, 3, 3, 3), int4=False),
    LayerCase("linear", lambda: nn.Linear(8, 5), (3, 8)),
    LayerCase("linear_3d", lambda: nn.Linear(8, 5, bias=False), (2, 3, 8)),
    LayerCase("linear_1d", lambda: nn.Linear(8, 5), (8,)),
    LayerCase("deconv1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    LayerCase("deconv1d_grouped", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), int4=False),
    LayerCase("deconv", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    LayerCase("deconv_grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), int4=False),
    LayerCase(
        "deconv_output_size",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        (2, 4, 5, 5),
        {"output_size": [10, 10]},
    ),
    LayerCase("deconv3d", lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    LayerCase("deconv3d_grouped", lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), (2, 4, 3, 3, 3), int4=False),
    LayerCase("lstm", lambda: nn.LSTM(4, 6), (5, 2, 4)),
    LayerCase("lstm_batch_first_no_bias", lambda: nn.LSTM(4, 6, batch_first=True, bias=False), (2, 5, 4)),
    LayerCase("gru", lambda: nn.GRU(4, 6), (5, 2, 4)),
    LayerCase("gru_batch_first", lambda: nn.GRU(4, 6, batch_first=True), (2, 5, 4)),
]
WIDTHS = [
    *(
        Width(activations, weights, algo)
        for algo in ("arq_retrain", "ulq_retrain")
        for activations, weights in ((8, 8), (16, 8), (8, 4), (4, 4))
    ),
    Width(algo="arq_retrain", channel_wise=False),
    Width(algo="ulq_retrain", channel_wise=False),
    Width(algo="arq_retrain", channel_wise=True),
    Width(algo="ulq_retrain", channel_wise=True),
]


LINEAR_INPUTS = (
    Width(symmetric=True),
    Width(algo="ulq_retrain", input="per_token"),
    Width(algo="ulq_retrain", input="none"),
)
"""What is known of a Linear only, or needs no other layer to be seen."""


def fits(layer: LayerCase, width: Width) -> bool:
    """Whether the layer can have such weights, and has others by default: linear layers have a single scale."""
    return (layer.int4 or width.weights == 8) and width.channel_wise in (None, "linear" in layer.name)


COMBINATIONS = [(layer, width) for layer in LAYERS for width in WIDTHS if fits(layer, width)]


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
