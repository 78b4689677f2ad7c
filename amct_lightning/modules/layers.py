"""The QAT twins of the layers: the float layer's own class plus two quantizers.

A twin keeps every attribute, parameter name and hook of the layer it was made from, because it *is* that object:
only its class changes. BatchNorm layers are left where they are.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.quantizers import ActivationQuantizer, WeightQuantizer

_Layer = TypeVar("_Layer", bound="QATLayer")


class QATLayer(nn.Module):
    """Mixin of all QAT layers: quantize the input and the weight, then run the layer's own operation.

    An evaluation before calibration runs the layer in float and warns once.

    Attributes:
        input_quantizer: Quantizer of the layer's input; layers that read one tensor share it.
        weight_quantizer: Quantizer of the layer's weight.
        calibrates_input: Whether this layer is the one that feeds a shared quantizer's calibration.
    """

    weight: Tensor
    input_quantizer: ActivationQuantizer
    weight_quantizer: WeightQuantizer
    calibrates_input: bool

    @classmethod
    def convert(
        cls: type[_Layer],
        layer: nn.Module,
        input_quantizer: ActivationQuantizer,
        weight_quantizer: WeightQuantizer,
        calibrates_input: bool = True,
    ) -> _Layer:
        """Turn a float layer into its QAT twin, in place.

        Args:
            layer: A layer of exactly the class this twin stands for.
            input_quantizer: Quantizer of its input.
            weight_quantizer: Quantizer of its weight.
            calibrates_input: Whether this layer feeds the calibration of ``input_quantizer``.

        Returns:
            The same object, now of this class.

        Example:
            >>> from amct_lightning.quantizers import ChannelLayout
            >>> layer = nn.Linear(4, 2)
            >>> weights = WeightQuantizer(8, False, ChannelLayout(), layer.weight)
            >>> QATLinear.convert(layer, ActivationQuantizer(), weights) is layer
            True
        """
        layer.__class__ = cls
        twin = cast(_Layer, layer)
        twin.input_quantizer = input_quantizer.to(twin.weight.device).train(layer.training)
        twin.weight_quantizer = weight_quantizer.to(twin.weight.device).train(layer.training)
        twin.calibrates_input = calibrates_input
        return twin

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on fake-quantized input and weight; arguments are those of the float layer."""
        quantizer = self.input_quantizer
        if quantizer.calibrating and not quantizer.training:
            _warn_float()
            return cast(Tensor, super().forward(input, *args, **kwargs))
        x = quantizer(input, self.calibrates_input)
        return self._operate(x, self.weight_quantizer(self.weight), *args, **kwargs)

    def _operate(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer's operation with a given weight."""
        raise TypeError(f"{type(self).__name__} is not a complete QAT layer: it defines no _operate().")


class QATConv2d(QATLayer, nn.Conv2d):
    """Quantized twin of :class:`torch.nn.Conv2d`."""

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, self.bias))


class QATLinear(QATLayer, nn.Linear):
    """Quantized twin of :class:`torch.nn.Linear`, for inputs of any rank."""

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QATConvTranspose2d(QATLayer, nn.ConvTranspose2d):
    """Quantized twin of :class:`torch.nn.ConvTranspose2d`."""

    def _operate(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        # _output_padding is private to torch.nn, but the only place that turns output_size into padding.
        padding = self._output_padding(
            x,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            padding,
            self.groups,
            self.dilation,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_float() -> None:
    # One constant text and place, so that Python's default filter shows it once for all layers.
    warnings.warn(
        "The model is evaluated before its activation quantizers are calibrated: un-calibrated layers run in "
        "float. Train for at least `batch_num` batches, or call amct_lightning.calibrate(model, batches), first.",
        stacklevel=2,
    )
