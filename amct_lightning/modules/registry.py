"""The one table of layer types that can be quantized: adding a type is one entry here and one QAT class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from amct_lightning.modules.convolutions import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
)
from amct_lightning.modules.layers import QATLayer, QATLinear
from amct_lightning.modules.recurrent import QATGRU, QATLSTM
from amct_lightning.quantizers import ChannelLayout


def _no_obstacle(_: Any) -> str | None:
    return None


def _conv_obstacle(layer: Any) -> str | None:
    mode = layer.padding_mode
    return None if mode == "zeros" else f"padding_mode is '{mode}', only 'zeros' is supported"


def _conv3d_obstacle(layer: Any) -> str | None:
    if layer.dilation[0] != 1:
        return f"dilation is {layer.dilation}, its first number must be 1"
    return _conv_obstacle(layer)


def _recurrent_obstacle(layer: Any) -> str | None:
    allowed = {"num_layers": 1, "bidirectional": False, "dropout": 0, "proj_size": 0}
    wrong = [
        f"{key} is {getattr(layer, key)}, not {value}" for key, value in allowed.items() if getattr(layer, key) != value
    ]
    return ", ".join(wrong) or None


@dataclass(frozen=True)
class LayerType:
    """What the package has to know of a layer type.

    Attributes:
        twin: The QAT class.
        packed: Names of the attributes that hold the lengths along which two INT4 weights share a byte.
        channel_wise: Whether there can be one weight scale per output channel; it is then the default.
        transposed: Whether the weight is stored input channel first.
        folds_batch_norm: Whether a BatchNorm that is its only reader is folded into the record.
        batched_dims: Rank of an input with a batch axis, if one without it cannot be quantized.
        by_default: Whether a default configuration lists it. AMCT does not know the others.
        finds_shared_weights: Whether a weight that it shares with another layer of its own type keeps both from
            being quantized.
        gates: For recurrent layers, where the gates in the order of the record (ONNX) are in the float layer's weight.
        min_readers: Only if its input is read by more layers than this does it share its quantizer with them.
        obstacle: Says why a layer of this type cannot be quantized, or ``None`` if it can.
    """

    twin: type[QATLayer]
    packed: tuple[str, ...] = ("in_channels",)
    channel_wise: bool = True
    transposed: bool = False
    folds_batch_norm: bool = False
    batched_dims: int | None = None
    by_default: bool = True
    finds_shared_weights: bool = True
    gates: tuple[int, ...] = ()
    min_readers: int = 0
    obstacle: Callable[[Any], str | None] = _no_obstacle

    def layout(self, layer: nn.Module) -> ChannelLayout:
        """Return where the output channels of the layer's weights are."""
        return ChannelLayout(True, cast(int, layer.groups)) if self.transposed else ChannelLayout()

    def scale_elements(self, layer: Any, weight: Tensor, channel_wise: bool) -> int:
        """Return the number of weight elements that normalizes the gradient of a learned scale.

        It is the number per output channel, but AMCT takes only the input channels for a per-tensor scale of
        one- and three-dimensional convolutions.
        """
        if not channel_wise and weight.dim() in (3, 5):
            return cast(int, layer.in_channels) // cast(int, layer.groups)
        outputs = cast(int, layer.out_channels) if self.transposed else weight.shape[0]
        return weight.numel() // outputs


LAYER_TYPES: Mapping[type[nn.Module], LayerType] = MappingProxyType(
    {
        nn.Conv1d: LayerType(
            QATConv1d, folds_batch_norm=True, batched_dims=3, finds_shared_weights=False, obstacle=_conv_obstacle
        ),
        nn.Conv2d: LayerType(QATConv2d, folds_batch_norm=True, batched_dims=4, obstacle=_conv_obstacle),
        nn.Conv3d: LayerType(QATConv3d, folds_batch_norm=True, batched_dims=5, obstacle=_conv3d_obstacle),
        nn.Linear: LayerType(QATLinear, packed=("in_features",), channel_wise=False),
        nn.ConvTranspose1d: LayerType(QATConvTranspose1d, transposed=True, batched_dims=3, obstacle=_conv_obstacle),
        nn.ConvTranspose2d: LayerType(QATConvTranspose2d, transposed=True, batched_dims=4, obstacle=_conv_obstacle),
        nn.ConvTranspose3d: LayerType(
            QATConvTranspose3d, transposed=True, batched_dims=5, by_default=False, obstacle=_conv_obstacle
        ),
        nn.LSTM: LayerType(
            QATLSTM,
            packed=("input_size", "hidden_size"),
            finds_shared_weights=False,
            gates=(0, 3, 1, 2),
            min_readers=3,
            obstacle=_recurrent_obstacle,
        ),
        nn.GRU: LayerType(
            QATGRU,
            packed=("input_size", "hidden_size"),
            finds_shared_weights=False,
            gates=(1, 0, 2),
            min_readers=2,
            obstacle=_recurrent_obstacle,
        ),
    }
)
"""Float class -> :class:`LayerType`; subclasses are not looked up, as in AMCT."""
