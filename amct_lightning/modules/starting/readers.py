"""What layers make of the values of a quantizer, for a calibration that goes by their outputs (``init: output``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from amct_lightning.modules.folding import current_weight
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import ActivationQuantizer
from amct_lightning.quantizers.functions.weight import fake_quantize_weight
from amct_lightning.quantizers.starting.output import Reader


def note_reader(quantizer: ActivationQuantizer, layer: nn.Module) -> None:
    """Let a quantizer whose calibration goes by outputs know a layer that reads its values; copies have copies of it.

    Args:
        quantizer: The quantizer.
        layer: The layer.
    """
    if quantizer.start[0] == "output":
        quantizer.readers = [*quantizer.readers, partial(readers_of, layer)]


@torch.no_grad()
def readers_of(layer: Any) -> Sequence[Reader]:
    """Return what a layer makes of its input with its weight as it is now, none if that cannot be told.

    A layer that was reverted since reads nothing that is quantized, and a weight that is sharded at present would have
    to be gathered by all ranks together.

    Args:
        layer: The layer.

    Example:
        >>> readers_of(nn.Linear(2, 2))
        ()
    """
    is_sharded = any(isinstance(parameter, DTensor) for parameter in layer.parameters(recurse=False))
    if not isinstance(layer, QATLayer) or is_sharded:
        return ()
    weight, quantizer = current_weight(layer).detach().float(), layer.weight_quantizer
    layout = quantizer.layout
    scale = layout.spread(quantizer.compute_scale(weight), layout.view(weight), quantizer.channel_wise)
    quantized = fake_quantize_weight(weight, scale, layout, quantizer.num_bits)
    return (Reader(partial(_product, layer, weight), partial(_product, layer, quantized)),)


def _product(layer: QATLayer, weight: Tensor, x: Tensor) -> Tensor:
    kind = x.device.type
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with exact:
        return layer._operate(x, weight, None)
