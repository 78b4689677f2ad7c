"""What runs the quantized layers of a model: setting it, and saying it."""

from __future__ import annotations

from typing import cast

from torch import nn

from amct_lightning.modules.convert import quantized_layers
from amct_lightning.modules.fused.integer import reason_against
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.executors import Execution, resolved


def set_execution(model: nn.Module, execution: Execution) -> None:
    """Let an executor run the quantizers of a model.

    Args:
        model: A converted model, or a wrapper around one.
        execution: ``"auto"``, ``"composite"``, ``"compiled"`` or ``"integer"``.

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


def without_integers(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers of a model whose products are computed in float though integers were asked for.

    Args:
        model: A converted model, or a wrapper around one.

    Returns:
        The reason -> the names of the layers; empty if no integers were asked for.

    Example:
        >>> without_integers(nn.Linear(2, 2))
        {}
    """
    found: dict[str, list[str]] = {}
    for name, layer in quantized_layers(model).items():
        device = next(layer.parameters()).device
        asked = resolved(cast(QATLayer, layer).execution, device.type) == "integer"
        reason = reason_against(layer, device) if asked else None
        if reason is not None:
            found.setdefault(reason, []).append(name)
    return found
