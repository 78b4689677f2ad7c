"""The one table of layer types that can be quantized: adding a type is one entry here and one class in layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from amct_lightning.modules.layers import QATConv2d, QATConvTranspose2d, QATLayer, QATLinear
from amct_lightning.quantizers import ChannelLayout


@dataclass(frozen=True)
class LayerType:
    """What the conversion has to know of a layer type.

    Attributes:
        twin: The QAT class.
        layout: Gives the weight layout of a layer of this type.
        channel_wise: Whether weight scales per output channel are possible, and the default.
        folds_batch_norm: Whether a BatchNorm that is its only reader is folded into the record.
        input_dims: Rank of a batched input; ``None`` if any rank will do.
        pack_axis: Length of the axis along which two INT4 weights share a byte, 1 where none can.
    """

    twin: type[QATLayer]
    layout: Callable[[Any], ChannelLayout]
    channel_wise: bool
    folds_batch_norm: bool
    input_dims: int | None
    pack_axis: Callable[[Any], int]


def _input_channels(layer: Any) -> int:
    return cast(int, layer.in_channels) if layer.groups == 1 else 1


_ROW_LAYOUT = ChannelLayout()

LAYER_TYPES: Mapping[type[nn.Module], LayerType] = MappingProxyType(
    {
        nn.Conv2d: LayerType(QATConv2d, lambda _: _ROW_LAYOUT, True, True, 4, _input_channels),
        nn.Linear: LayerType(QATLinear, lambda _: _ROW_LAYOUT, False, False, None, lambda m: m.in_features),
        nn.ConvTranspose2d: LayerType(
            QATConvTranspose2d, lambda m: ChannelLayout(True, m.groups), True, False, 4, _input_channels
        ),
    }
)
"""Float class -> :class:`LayerType`; subclasses are not looked up, as in AMCT."""


def unsupported_reason(layer: nn.Module) -> str | None:
    """Return why a layer of a listed type cannot be quantized, or ``None`` if it can.

    Args:
        layer: A layer whose class is in :data:`LAYER_TYPES`.

    Example:
        >>> unsupported_reason(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
        "padding_mode is 'reflect', only 'zeros' is supported"
    """
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else f"padding_mode is '{mode}', only 'zeros' is supported"
