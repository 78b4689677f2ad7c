"""What runs the quantized layers of a model: setting it, and saying it."""

from __future__ import annotations

from typing import cast

from torch import nn

from amct_lightning.modules.convert import quantized_layers
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.executors import Execution, resolved


def set_execution(model: nn.Module, execution: Execution) -> None:
    """Let an executor run the quantizers of a model.

    Args:
        model: A converted model, or a wrapper around one.
        execution: ``"auto"``, ``"composite"`` or ``"compiled"``.

    Example:
        >>> set_execution(nn.Linear(2, 2), "composite")
    """
    for layer in quantized_layers(model).values():
        cast(QATLayer, layer).execution = execution


def execution_of(model: nn.Module) -> str:
    """Return what runs the quantizers of a model where it is now; ``"composite"`` if there are none.

    Args:
        model: A converted model, or a wrapper around one.

    Example:
        >>> execution_of(nn.Linear(2, 2))
        'composite'
    """
    for layer in quantized_layers(model).values():
        return resolved(cast(QATLayer, layer).execution, next(layer.parameters()).device.type)
    return "composite"
