"""The operators that quantized layers are in ONNX, and how their weights lie there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from amct_lightning.export.forms.editing import Site
from amct_lightning.export.numbers import Array
from amct_lightning.layer_types import LAYER_TYPES, supported_class


@dataclass(frozen=True)
class Operator:
    """The node that a layer without recurrence becomes.

    Attributes:
        type: ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul``.
        attributes: Its attributes.
        packed_axis: The axis of the input channels in its weight, along which two INT4 values share a byte.
        channel_shape: The shape in which one number per output channel broadcasts over its output.
        channel_axis: The axis of the output channels in its weight, for a scale per channel.
    """

    type: str
    attributes: dict[str, Any]
    packed_axis: int
    channel_shape: tuple[int, ...]
    channel_axis: int

    @property
    def adds_bias(self) -> bool:
        """Whether the node has an input for the bias."""
        return self.type != "MatMul"

    def weight(self, values: Array) -> Array:
        """Return a weight as the node wants it.

        Args:
            values: The weight as the float layer lays it out.
        """
        return values if self.type in ("Conv", "ConvTranspose") else values.T

    def bias_after(self, site: Site, output: ir.Value) -> ir.Value:
        """Add the bias in float where the node has no input for it, as the exporter does it in AMCT.

        Args:
            site: Where the layer is called.
            output: The output without the bias.
        """
        bias = site.numbers.product.float_bias
        if self.adds_bias or bias is None:
            return output
        value = site.edit.initializer(site.bias_name, bias, meaning="float")
        return site.edit.node("Add", (value, output), f"/{site.name.replace('.', '/')}/Add")[0]


def operator_of(site: Site) -> Operator:
    """Return the node that a layer becomes.

    Args:
        site: Where it is called.
    """
    layer = site.layer
    if isinstance(layer, nn.Linear):
        # As in torch's own exporters: Gemm takes two axes and has a bias.
        if site.call.rank == 2 and layer.bias is not None and not site.numbers.product.group_size:
            return Operator("Gemm", {"alpha": 1.0, "beta": 1.0, "transB": 0}, 0, (1, -1), 1)
        return Operator("MatMul", {}, 0, (1, -1) if site.call.rank > 1 else (-1,), 1)
    dims = len(layer.kernel_size)
    attributes = {
        "dilations": list(layer.dilation),
        "group": layer.groups,
        "kernel_shape": list(layer.kernel_size),
        "pads": _pads(layer),
        "strides": list(layer.stride),
    }
    channels = (1, -1, *[1] * dims)
    if not LAYER_TYPES[supported_class(layer)].transposed:
        return Operator("Conv", attributes, 1, channels, 0)
    if any(site.call.output_padding):
        attributes["output_padding"] = list(site.call.output_padding)
    return Operator("ConvTranspose", attributes, 0, channels, 1)


def _pads(layer: Any) -> list[int]:
    """Return the padding at the beginning of all axes, then at their ends."""
    if not isinstance(layer.padding, str):
        return [*layer.padding, *layer.padding]
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    totals = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]


def packed(codes: Array, axis: int, name: str) -> Array:
    """Put two INT4 values into each byte: the one of even index into the lower half, the next one into the upper.

    Args:
        codes: The values, int8.
        axis: The axis along which they are paired.
        name: Name of the layer, for messages.

    Returns:
        The bytes, int8; the axis has half its length.

    Example:
        >>> packed(np.array([[1, -2, 3, 4]], dtype=np.int8), 1, "fc")
        array([[-31,  67]], dtype=int8)
    """
    length = codes.shape[axis]
    if length % 2:
        raise RuntimeError(
            f"INT4 quant-axis length {length} is odd: the weights of layer '{name}' cannot be packed two per byte. "
            'Set dst_type of its weights to "INT8".'
        )
    pairs = np.moveaxis(codes, axis, -1)
    low, high = pairs[..., 0::2], pairs[..., 1::2]
    together = ((high.astype(np.uint8) << 4) | (low.astype(np.uint8) & 0xF)).view(np.int8)
    return np.moveaxis(together, -1, axis)
