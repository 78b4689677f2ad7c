"""The one table of facts about the layer types that can be quantized; imports torch only.

Adding a type is one entry here, one QAT class in ``modules/`` and its line in ``modules/registry.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn


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
        packed: Names of the attributes that hold the lengths along which two INT4 weights share a byte.
        channel_wise: Whether each output channel has a weight scale of its own by default. Where not, it can have one
            all the same, of which neither AMCT's files nor the Ascend compiler know.
        has_groups: Whether INT4 weights can have a scale for each group of inputs of an output channel.
        activations: How its input may be quantized.
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

    packed: tuple[str, ...] = ("in_channels",)
    channel_wise: bool = True
    has_groups: bool = False
    activations: tuple[str, ...] = ("ulq_quantize",)
    transposed: bool = False
    folds_batch_norm: bool = False
    batched_dims: int | None = None
    by_default: bool = True
    finds_shared_weights: bool = True
    gates: tuple[int, ...] = ()
    min_readers: int = 0
    obstacle: Callable[[Any], str | None] = _no_obstacle

    def int4_obstacle(self, layer: nn.Module) -> str | None:
        """Say why the weights cannot be packed two INT4 values per byte along the input-channel axis.

        Args:
            layer: A layer of this type.

        Returns:
            The reason, or ``None`` if nothing is in the way.

        Example:
            >>> LAYER_TYPES[nn.Linear].int4_obstacle(nn.Linear(3, 8))
            'in_features=3 is odd'
            >>> LAYER_TYPES[nn.Linear].int4_obstacle(nn.Linear(4, 8)) is None
            True
        """
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            return f"groups={groups}"
        lengths = {name: getattr(layer, name) for name in self.packed}
        return " and ".join(f"{name}={length} is odd" for name, length in lengths.items() if length % 2) or None

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
            folds_batch_norm=True, batched_dims=3, finds_shared_weights=False, obstacle=_conv_obstacle
        ),
        nn.Conv2d: LayerType(folds_batch_norm=True, batched_dims=4, obstacle=_conv_obstacle),
        nn.Conv3d: LayerType(folds_batch_norm=True, batched_dims=5, obstacle=_conv3d_obstacle),
        nn.Linear: LayerType(
            packed=("in_features",),
            channel_wise=False,
            has_groups=True,
            activations=("ulq_quantize", "per_token", "none"),
        ),
        nn.ConvTranspose1d: LayerType(transposed=True, batched_dims=3, obstacle=_conv_obstacle),
        nn.ConvTranspose2d: LayerType(transposed=True, batched_dims=4, obstacle=_conv_obstacle),
        nn.ConvTranspose3d: LayerType(transposed=True, batched_dims=5, by_default=False, obstacle=_conv_obstacle),
        nn.LSTM: LayerType(
            packed=("input_size", "hidden_size"),
            finds_shared_weights=False,
            gates=(0, 3, 1, 2),
            min_readers=3,
            obstacle=_recurrent_obstacle,
        ),
        nn.GRU: LayerType(
            packed=("input_size", "hidden_size"),
            finds_shared_weights=False,
            gates=(1, 0, 2),
            min_readers=2,
            obstacle=_recurrent_obstacle,
        ),
    }
)
"""Float class -> :class:`LayerType`; subclasses are not looked up, as in AMCT."""


def supported_class(layer: nn.Module) -> type[nn.Module]:
    """Return the supported float class that a layer, float or quantized, is of or derives from.

    Args:
        layer: A layer of such a class, before or after the conversion.

    Example:
        >>> supported_class(nn.LazyLinear(2)).__name__
        'Linear'
    """
    return next(kind for kind in LAYER_TYPES if isinstance(layer, kind))
