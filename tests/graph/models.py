"""What the tests of the graph observe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.plan import LayerPlan


def layers(model: nn.Module, input_data: Any) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in make_plan(model, None, input_data).layers}


def image() -> Tensor:
    return torch.randn(2, 2, 6, 6)


class Model(nn.Module):
    """Any function of two linear layers, a convolution and a BatchNorm."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)
