"""Which QAT class stands for which float class; what else there is to know of a type is in ``layer_types.py``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from torch import nn

from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.modules.convolutions import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
)
from amct_lightning.modules.layers import QATLayer, QATLinear
from amct_lightning.modules.rangeless import QATRangelessLinear
from amct_lightning.modules.recurrent import QATGRU, QATLSTM
from amct_lightning.quantizers import ChannelLayout

QAT_CLASSES: Mapping[type[nn.Module], type[QATLayer]] = MappingProxyType(
    {
        nn.Conv1d: QATConv1d,
        nn.Conv2d: QATConv2d,
        nn.Conv3d: QATConv3d,
        nn.Linear: QATLinear,
        nn.ConvTranspose1d: QATConvTranspose1d,
        nn.ConvTranspose2d: QATConvTranspose2d,
        nn.ConvTranspose3d: QATConvTranspose3d,
        nn.LSTM: QATLSTM,
        nn.GRU: QATGRU,
    }
)
"""Float class -> its QAT class; subclasses are not looked up, as in AMCT."""


def qat_class(layer: nn.Module, has_clips: bool) -> type[QATLayer]:
    """Return the QAT class of a float layer.

    Args:
        layer: The float layer.
        has_clips: Whether its input has a range; if not, it is a Linear.

    Example:
        >>> qat_class(nn.Linear(2, 2), has_clips=False).__name__
        'QATRangelessLinear'
    """
    return QAT_CLASSES[type(layer)] if has_clips else QATRangelessLinear


def channel_layout(layer: nn.Module) -> ChannelLayout:
    """Return where the output channels of a float layer's weights are."""
    transposed = LAYER_TYPES[type(layer)].transposed
    return ChannelLayout(True, cast(int, layer.groups)) if transposed else ChannelLayout()
