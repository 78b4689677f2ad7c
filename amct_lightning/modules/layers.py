"""What all QAT layers have in common, and the simplest of them, Linear.

A twin keeps every attribute, parameter name and hook of the layer it was made from, because it *is* that object:
only its class changes. BatchNorm layers are left where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_lightning.modules.fused.forward import run_fused, runs_fused
from amct_lightning.modules.fused.integer import PACKED
from amct_lightning.modules.fused.products import MATRIX_PRODUCT
from amct_lightning.modules.grid.forward import forward_on_grid
from amct_lightning.modules.grid.norm import FoldedNorm, norm_of, release_norm
from amct_lightning.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer, is_exporting
from amct_lightning.quantizers.base import in_torch_export
from amct_lightning.quantizers.transforms import call, direct_form

_Layer = TypeVar("_Layer", bound="QATLayer")


class QATLayer(nn.Module):
    """Mixin of all QAT layers: quantize the input and the weight, then run the layer's own operation.

    An evaluation before calibration runs the layer in float and warns, in every layer and pass in the same words at the
    same place: Python's default filter shows it once.

    Attributes:
        activation_quantizers: Names of the activation quantizers.
        weight_quantizers: Names of the weight quantizers, and of the parameter each of them quantizes.
        input_quantizer: Quantizer of the layer's input; layers that read one tensor share it.
        weight_quantizer: Quantizer of the layer's weight.
        calibrates_input: Whether this layer is the one that feeds a shared quantizer's calibration.
        keeps_input: Whether the float layer keeps its input for backward even if its weight needs no gradient. Where it
            does not, the input may be changed in place, so that the quantizer has to work on a copy.
        float_expected_of: The id of this layer if nobody needs to be told that it runs in float; a copy has another.
        quant_mode: ``"quantized"``; ``"float"`` to run as before the conversion; ``"observe"`` to do so and calibrate
            on the way.
        deploy_grid: Whether it computes with what the device computes with, see :func:`amct_lightning.prepare_qat`.
        execution: What runs the formulas of its quantizers, see there.
    """

    activation_quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer",)
    keeps_input: ClassVar[bool] = True
    weight_quantizers: ClassVar[Mapping[str, str]] = MappingProxyType({"weight_quantizer": "weight"})

    input_quantizer: ActivationQuantizer
    weight_quantizer: WeightQuantizer
    calibrates_input: bool
    float_expected_of: int = 0
    quant_mode: Literal["quantized", "float", "observe"] = "quantized"
    deploy_grid: bool = False
    execution: str = "auto"

    @classmethod
    def convert(
        cls: type[_Layer], layer: nn.Module, quantizers: Mapping[str, Quantizer], calibrates_input: bool = True
    ) -> _Layer:
        """Turn a float layer into its QAT twin, in place.

        Args:
            layer: A layer of exactly the class this twin stands for.
            quantizers: The quantizers of ``activation_quantizers`` and ``weight_quantizers``, by name.
            calibrates_input: Whether this layer feeds the calibration of its input quantizer.

        Returns:
            The same object, now of this class.

        Example:
            >>> from amct_lightning.quantizers import ChannelLayout
            >>> layer = nn.Linear(4, 2)
            >>> weights = WeightQuantizer(8, False, ChannelLayout(), layer.weight)
            >>> quantizers = {"input_quantizer": ActivationQuantizer(), "weight_quantizer": weights}
            >>> QATLinear.convert(layer, quantizers) is layer
            True
        """
        layer.__class__ = cls
        twin = cast(_Layer, layer)
        device = next(layer.parameters()).device
        for name, quantizer in quantizers.items():
            setattr(twin, name, quantizer.to(device).train(layer.training))
        twin.calibrates_input = calibrates_input
        return twin

    @classmethod
    def float_class(cls) -> type[nn.Module]:
        """Return the class that this one is the twin of: the last of its bases."""
        return cast(type[nn.Module], cls.__bases__[-1])

    def revert(self) -> None:
        """Turn the layer back into the float layer that it was made from, in place; its weights stay."""
        release_norm(self)
        for name in (*self.activation_quantizers, *self.weight_quantizers):
            delattr(self, name)
        for attribute in ("calibrates_input", "float_expected_of", "quant_mode", "deploy_grid", "execution", PACKED):
            self.__dict__.pop(attribute, None)
        self.__class__ = self.float_class()  # type: ignore[assignment]

    @property
    def runs_in_float(self) -> bool:
        """Whether the layer is to run in float, or is evaluated before it is calibrated; then it warns."""
        if self.quant_mode != "quantized":
            return True
        return self._lacks_range and (self._exports_float() if in_torch_export() else self._stays_float())

    @property
    def _lacks_range(self) -> bool:
        for quantizer in map(self.get_quantizer, self.activation_quantizers):  # in every step, so without a generator
            if not (quantizer.has_range or quantizer.learns):
                return True
        return False

    def _exports_float(self) -> bool:
        """Tell of a layer whose range is not known here that it is exported in float; nothing can be read now."""
        if self.float_expected_of != id(self) and not torch.compiler.is_dynamo_compiling():
            copied = any(self.get_quantizer(name).is_copy for name in self.activation_quantizers)
            (_warn_copy if copied else _warn_float)()
        return True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stays_float(self) -> bool:
        """Tell whether there is no range indeed, of which a copy may have been given the state only; then warn."""
        quantizers = [self.get_quantizer(name) for name in self.activation_quantizers]
        for quantizer in quantizers:
            if quantizer.is_copy:  # reads the device
                quantizer.catch_up()
        waiting = [quantizer for quantizer in quantizers if not quantizer.has_range]
        if not waiting:
            return False
        if self.float_expected_of != id(self) and not all(quantizer.missed for quantizer in waiting):
            _warn_float()
        return True

    @property
    def is_missed(self) -> bool:
        """Whether no training batch has reached it, so that it is evaluated in float and left out of the record."""
        return any(self.get_quantizer(name).missed for name in self.activation_quantizers)

    def get_quantizer(self, name: str) -> ActivationQuantizer:
        """Return an activation quantizer by name."""
        return cast(ActivationQuantizer, getattr(self, name))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on fake-quantized input and weight; arguments are those of the float layer."""
        if self.runs_in_float:
            if self.quant_mode == "observe":
                self._observe(input)
            return self.keep_in_graph(cast(Tensor, self.float_forward(input, *args, **kwargs)))
        weight = cast(Tensor, self.weight)
        input = self.kept(input, weight)
        if (self.training or not self.on_grid) and runs_fused(self, input, weight):
            return self._run_fused(input, weight, *args, **kwargs)
        if self.on_grid:

            def operate(x: Tensor, weight: Tensor) -> Tensor:
                return self._operate(x, weight, None, *args, **kwargs)

            return forward_on_grid(self, self.folded_norm(), input, operate)
        x = self.input_quantizer(input, self.calibrates_input)
        return self._operate(x, self.weight_quantizer(weight), cast("Tensor | None", self.bias), *args, **kwargs)

    def _run_fused(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on quantized input and weight as one operation for autograd."""
        raise TypeError(f"{type(self).__name__} is not a complete QAT layer: it defines no _run_fused().")

    @property
    def on_grid(self) -> bool:
        """Whether it computes as the device does, if it is quantized; what is exported says itself what it computes."""
        return self.has_grid and not is_exporting()

    @property
    def has_grid(self) -> bool:
        """Whether it is to compute as a device or a server does."""
        return self.deploy_grid or self.serving is not None

    @property
    def serving(self) -> torch.dtype | None:
        """The dtype in which it computes as a server does; ``None`` if it does not."""
        quantizer = self.input_quantizer
        return quantizer.serving if isinstance(quantizer, ActivationQuantizer) else None

    def folded_norm(self) -> FoldedNorm | None:
        """Return the BatchNorm whose output is that of this layer at present, if there is one.

        In training, and where either of the two is in training, the BatchNorm normalizes what the layer gives.
        """
        if not self.on_grid or self.training or self.quant_mode != "quantized" or self._lacks_range:
            return None
        norm = norm_of(self)
        return None if norm is None or norm.training else norm

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as it was before the conversion."""
        return super().forward(*args, **kwargs)

    def keep_in_graph(self, output: Tensor) -> Tensor:
        """Let the factors of a layer that is told to run in float have a gradient, of zero, as DDP wants them to."""
        if self.quant_mode == "quantized" or not torch.is_grad_enabled() or is_exporting():
            return output
        names = (*self.activation_quantizers, *self.weight_quantizers)
        factors = [p for name in names for p in getattr(self, name).parameters()]
        return call(_KeepInGraph, _KEEP_IN_GRAPH, output, *factors)

    def kept(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the input, or a copy of it if backward needs its values and those of the float layer would not."""
        if self.keeps_input or weight.requires_grad or not torch.is_grad_enabled() or is_exporting():
            return input
        clips = self.input_quantizer.parameters()
        return input.clone() if input.requires_grad or any(clip.requires_grad for clip in clips) else input

    def _observe(self, input: Tensor) -> None:
        """Calibrate on an input without quantizing it."""
        if self.input_quantizer.calibrating:
            self.input_quantizer.update_range(input, self.calibrates_input)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        settings: str = super().extra_repr()
        settings += f", serving={str(self.serving).removeprefix('torch.')}" if self.serving is not None else ""
        return f"{settings}, deploy_grid=True" if self.deploy_grid else settings

    def bias_follows(self, input: Tensor) -> bool:
        """Tell whether the deployed operator takes no bias, which is then added to its output in float.

        Args:
            input: The input of the layer.
        """
        return False

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer's operation with a given weight and bias."""
        raise TypeError(f"{type(self).__name__} is not a complete QAT layer: it defines no _operate().")


class _KeepInGraph(torch.autograd.Function):
    """The first tensor as it is; the gradient of the others is zero. Their values are not kept: they may change."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, *_factors: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors = [(factor.shape, factor.dtype, factor.device) for factor in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.factors))

    @staticmethod
    def jvp(_ctx: Any, output: Tensor | None, *_factors: Any) -> Tensor | None:
        return None if output is None else output.view_as(output)


_KEEP_IN_GRAPH = direct_form(_KeepInGraph)


class QATLinear(QATLayer, nn.Linear):
    """Quantized twin of :class:`torch.nn.Linear`, for inputs of any rank."""

    keeps_input: ClassVar[bool] = False

    def bias_follows(self, input: Tensor) -> bool:
        """Tell so for all inputs but those of two axes: MatMul takes no bias. A server adds it to the sums."""
        return self.serving is None and input.dim() != 2

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _run_fused(self, input: Tensor, weight: Tensor) -> Tensor:
        return run_fused(self, MATRIX_PRODUCT, input, weight, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_float() -> None:
    # One constant text and place, so that Python's default filter shows it once for all layers.
    warnings.warn(
        "The model is evaluated before its activation quantizers are calibrated: un-calibrated layers run in "
        "float. Train for at least `batch_num` batches, or call amct_lightning.calibrate(model, batches), first.",
        stacklevel=3,
    )


def _warn_copy() -> None:
    warnings.warn(
        "A copy of a model is exported that knows of no calibration: its layers are exported in float. If it was "
        "given the state of a calibrated model otherwise than by load_state_dict, as averages of weights are, call it "
        "once in evaluation mode before the export; if not, call amct_lightning.calibrate(model, batches) first.",
        stacklevel=3,
    )
