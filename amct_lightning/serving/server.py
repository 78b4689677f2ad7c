"""Linear layers that compute as a server does, from the tensors of a checkpoint alone.

The formulas are those of the schemes of vllm-ascend and of torch_npu's operators that they call. Sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from amct_lightning.serving.tensors import ServedType


class ServerLinear(nn.Module):
    """A layer of a server.

    Args:
        tensors: Its tensors as they are in the checkpoint, by the last part of their names.
        dtype: The dtype of the server.
    """

    kind: ClassVar[ServedType]
    shapes: ClassVar[Mapping[str, tuple[str, str]]]
    """The tensors that it has: their dtype, and their shape with ``n`` outputs and ``k`` inputs."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features: int = tensors["weight"].shape[0]
        self.in_features: int = tensors["weight"].shape[1]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", tensors.get("bias"))

    def codes(self, x: Tensor) -> Tensor | None:
        """Return the integers that an input is quantized to, float32; ``None`` if it is not.

        Args:
            x: The input, tokens along the last axis.
        """
        raise TypeError(f"{type(self).__name__} is not a complete layer: it defines no codes().")


class StaticLinear(ServerLinear):
    """``W8A8``: ``npu_quantize`` with the reciprocal of the scale, ``npu_quant_matmul`` with an integer bias.

    Example:
        >>> names = "weight", "input_scale", "input_offset", "deq_scale", "quant_bias"
        >>> weight, scale = torch.tensor([[2, 4]], dtype=torch.int8), torch.tensor([0.5])
        >>> values = weight, scale, torch.zeros(1), scale * 0.25, torch.tensor([8], dtype=torch.int32)
        >>> StaticLinear(dict(zip(names, values)), torch.bfloat16)(torch.ones(1, 2))
        tensor([[2.5000]], dtype=torch.bfloat16)
    """

    kind = "W8A8"
    shapes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "weight": ("int8", "n,k"),
        "input_scale": ("float32", "1"),
        "input_offset": ("float32", "1"),
        "deq_scale": ("deq", "n"),
        "quant_bias": ("int32", "n"),
    }
    input_scale: Tensor
    input_offset: Tensor
    deq_scale: Tensor
    quant_bias: Tensor
    weight: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """See :meth:`ServerLinear.codes`."""
        reciprocal = 1 / self.input_scale.to(self.dtype)
        rounded = torch.round(x.to(self.dtype).float() * reciprocal.float())
        return (rounded + self.input_offset).clamp(-128, 127)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in the dtype of the server."""
        scale = self.deq_scale
        if scale.dtype == torch.int64:  # the pattern of a float32 number
            scale = scale.to(torch.int32).view(torch.float32)
        sums = exact_sums(self.codes(x), self.weight) + self.quant_bias
        return (sums.float() * scale).to(self.dtype)


class DynamicLinear(ServerLinear):
    """``W8A8_DYNAMIC``: ``npu_dynamic_quant`` per token, ``npu_quant_matmul`` with both scales."""

    kind = "W8A8_DYNAMIC"
    shapes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "weight": ("int8", "n,k"),
        "weight_scale": ("float32", "n,1"),
        "weight_offset": ("float32", "n,1"),
    }
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def token_scale(self, x: Tensor) -> Tensor:
        """Return the scale of each token, float32: its largest magnitude over 127, 1 for a token of zeros."""
        scale = x.to(self.dtype).float().abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, scale, 1.0)

    def codes(self, x: Tensor) -> Tensor:
        """See :meth:`ServerLinear.codes`."""
        return torch.round(x.to(self.dtype).float() / self.token_scale(x)).clamp(-128, 127)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in the dtype of the server."""
        output = exact_sums(self.codes(x), self.weight).float() * self.weight_scale.view(-1) * self.token_scale(x)
        output = output if self.bias is None else output + self.bias.float()
        return output.to(self.dtype)


class WeightOnlyLinear(ServerLinear):
    """``W8A16``: float activations, the weight in the dtype of the server."""

    kind = "W8A16"
    shapes: ClassVar[Mapping[str, tuple[str, str]]] = DynamicLinear.shapes
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def codes(self, x: Tensor) -> None:
        """See :meth:`ServerLinear.codes`."""
        return

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in the dtype of the server."""
        weight = (self.weight.float() * self.weight_scale).to(self.dtype)
        return nn.functional.linear(x.to(self.dtype), weight, self.bias)


SERVER_LAYERS: Mapping[str, type[ServerLinear]] = {
    layer.kind: layer for layer in (StaticLinear, DynamicLinear, WeightOnlyLinear)
}


def exact_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of products of integers, exact in float64, which holds all integers below 2**53."""
    return torch.nn.functional.linear(codes.double(), weight.double())
