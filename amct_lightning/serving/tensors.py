"""The tensors of a checkpoint in the form AscendV1: their names, types and values, one after another.

Formulas and names are those of the ``W8A8``, ``W8A8_DYNAMIC`` and ``W8A16`` schemes of vllm-ascend, and of what
msModelSlim writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from amct_lightning.modules.deployed import weight_codes
from amct_lightning.modules.folding import current_weight, deployed_scale, whole_tensor
from amct_lightning.modules.grid.serving import serving_factors
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.base import Quantizer
from amct_lightning.quantizers.rangeless import TokenQuantizer

ServedType = Literal["W8A8", "W8A8_DYNAMIC", "W8A16", "FLOAT"]
"""What servers call the ways in which a layer is computed, the one of the fewest bits first."""

SERVED_TYPES: tuple[ServedType, ...] = ("W8A8", "W8A8_DYNAMIC", "W8A16", "FLOAT")


class Entry(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        name: Its name there.
        kind: What the description says of it.
        value: The tensor.
    """

    name: str
    kind: ServedType
    value: Tensor


def served_type(layer: QATLayer) -> ServedType:
    """Return what servers call the way in which a quantized layer is computed.

    Args:
        layer: The layer.

    Example:
        >>> from amct_lightning import prepare_qat
        >>> model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4), target="serving")
        >>> served_type(model[0])
        'W8A8'
    """
    if layer.serving is not None:
        return "W8A8"
    return "W8A8_DYNAMIC" if isinstance(layer.input_quantizer, TokenQuantizer) else "W8A16"


def entries(network: nn.Module, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield the tensors of the checkpoint, those of a layer when they are asked for, so that few exist at a time.

    Of weights that are sharded the whole of one layer is gathered at a time, so that all ranks have to do this.

    Args:
        network: The converted network, with the names that the server knows.
        dtype: What float tensors are written in.
    """
    seen: set[int] = set()
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, QATLayer):
            yield from _of_layer(prefix, module, dtype)
        elif not isinstance(module, Quantizer):
            for own, tensor in _own_tensors(module):
                if id(tensor) not in seen:  # a tied weight is written once, under its first name
                    seen.add(id(tensor))
                    whole = whole_tensor(tensor.detach())
                    yield Entry(prefix + own, "FLOAT", whole.to(dtype) if whole.is_floating_point() else whole)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **kept}.items():
        if tensor is not None:
            yield name, tensor


@torch.no_grad()
def _of_layer(prefix: str, layer: QATLayer, dtype: torch.dtype) -> Iterator[Entry]:
    kind = served_type(layer)
    for name, tensor in _TENSORS[kind](layer).items():
        yield Entry(prefix + name, kind, tensor)
    if layer.bias is not None:
        # W8A8 has the bias among the sums; the servers read it in float all the same, and add it for the other types.
        bias = current_weight(layer, "bias").detach()
        yield Entry(f"{prefix}bias", "FLOAT", bias.float() if kind == "W8A8" else bias.to(dtype))


def _static(layer: QATLayer) -> dict[str, Tensor]:
    factors = serving_factors(layer)
    deq_scale = factors.deq_scale
    if factors.dtype == torch.float16:
        deq_scale = deq_scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return {
        "weight": factors.weight,
        "input_scale": factors.input_scale.detach().view(1),
        "input_offset": factors.input_offset.detach().view(1),
        "deq_scale": deq_scale,
        "quant_bias": factors.quant_bias,
    }


def _weight_only(layer: QATLayer) -> dict[str, Tensor]:
    weight, quantizer = current_weight(layer), layer.weight_quantizer
    scale = deployed_scale(quantizer, weight, None)
    codes = weight_codes(weight.float(), scale, quantizer.layout, quantizer.num_bits).to(torch.int8)
    by_row = scale.expand(len(codes)).reshape(-1, 1).contiguous()
    return {"weight": codes, "weight_scale": by_row, "weight_offset": torch.zeros_like(by_row)}


_TENSORS: dict[ServedType, Callable[[QATLayer], dict[str, Tensor]]] = {
    "W8A8": _static,
    "W8A8_DYNAMIC": _weight_only,
    "W8A16": _weight_only,
}
