"""The quantizers as operators of ``torch.ops.amct_lightning``: what stands in a graph that ``torch.export`` makes.

Such a graph then has one node per quantizer, with its clips or scales as inputs, in place of a dozen elementary ones.
Outside of an export nothing calls them. They are *composite*, so that no compiler has to know them: ``torch.export``
keeps them as nodes, and ``run_decompositions``, ``torch.onnx.export`` and Inductor replace them by what they compute.
Whoever wants them kept takes them out of the table of decompositions, or gives ``torch.onnx.export`` a translation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.quantizers.base import in_torch_export
from amct_lightning.quantizers.functional import range_around_zero, repair_clips
from amct_lightning.quantizers.functions.activation import clips_around_zero, fake_quantize_activation
from amct_lightning.quantizers.functions.weight import ChannelLayout, arq_scale, fake_quantize_weight
from amct_lightning.quantizers.transforms import transforming

_LIBRARY = torch.library.Library("amct_lightning", "DEF")
_LIBRARY.define(
    "fake_quantize_activation(Tensor x, Tensor clip_max, Tensor clip_min, Tensor clip_max_previous, "
    "Tensor clip_min_previous, int num_bits, bool fixed_min, bool symmetric=False) -> Tensor"
)
_LIBRARY.define(
    "fake_quantize_weight(Tensor weight, Tensor? scale, int num_bits, bool channel_wise, bool transposed, int groups,"
    " int group_size) -> Tensor"
)
_COMPOSITE = "CompositeImplicitAutograd"


@torch.library.impl(_LIBRARY, "fake_quantize_activation", _COMPOSITE)
def _fake_quantize_activation(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    clip_max_previous: Tensor,
    clip_min_previous: Tensor,
    num_bits: int,
    fixed_min: bool,
    symmetric: bool = False,
) -> Tensor:
    with torch.no_grad():
        upper, lower = repair_clips(clip_max, clip_min, clip_max_previous, clip_min_previous, fixed_min)
    if symmetric:
        with torch.no_grad():
            upper, lower = range_around_zero(upper, lower, num_bits)
        clip_max, clip_min = clips_around_zero(clip_max, clip_min, num_bits)
    return fake_quantize_activation(x, clip_max, clip_min, upper, lower, num_bits, torch.float32)


@torch.library.impl(_LIBRARY, "fake_quantize_weight", _COMPOSITE)
def _fake_quantize_weight(
    weight: Tensor,
    scale: Tensor | None,
    num_bits: int,
    channel_wise: bool,
    transposed: bool,
    groups: int,
    group_size: int,
) -> Tensor:
    layout, values = ChannelLayout(transposed, groups, group_size), weight.float()
    if scale is None:
        with torch.no_grad():
            shaped = arq_scale(values, layout, num_bits, channel_wise)
    else:
        shaped = layout.spread(scale, layout.view(values), channel_wise)
    return fake_quantize_weight(values, shaped, layout, num_bits).to(weight.dtype)


def takes_operators() -> bool:
    """Tell whether the operators are to stand in the graph that is made now."""
    return in_torch_export() and not transforming()


def activation_operator(
    x: Tensor, clips: tuple[Tensor, Tensor, Tensor, Tensor], num_bits: int, fixed_min: bool, symmetric: bool
) -> Tensor:
    """Put the operator of an activation quantizer into the graph.

    Args:
        x: Activations.
        clips: The upper and lower clip, and those that replace them if they are unusable.
        num_bits: 4, 8 or 16.
        fixed_min: Whether the lower clip is fixed to 0.
        symmetric: Whether the range is one around 0.
    """
    settings = (num_bits, fixed_min, True) if symmetric else (num_bits, fixed_min)
    return _once(torch.ops.amct_lightning.fake_quantize_activation.default, x, *clips, *settings)


def weight_operator(
    weight: Tensor, scale: Tensor | None, layout: ChannelLayout, num_bits: int, channel_wise: bool
) -> Tensor:
    """Put the operator of a weight quantizer into the graph.

    Args:
        weight: The weight.
        scale: Its scales; ``None`` for the max-abs ones.
        layout: Where the output channels are.
        num_bits: 4 or 8.
        channel_wise: One scale per output channel, else one for the whole weight.
    """
    settings = num_bits, channel_wise, layout.transposed, layout.groups, layout.group_size
    return _once(torch.ops.amct_lightning.fake_quantize_weight.default, weight, scale, *settings)


def _once(operator: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Call an operator, or return what it has given for the same tensors in this graph: layers share a quantizer.

    The note of it hangs on the tensor of the graph, so that it goes with it, and never on one with values, which the
    model may keep. A tensor that was written to since is another one.
    """
    tensors = [arg for arg in (x, *args) if isinstance(arg, Tensor)]
    noted = type(x) not in (Tensor, nn.Parameter) and not any(tensor.is_inference() for tensor in tensors)
    if torch.compiler.is_dynamo_compiling() or not noted:
        return operator(x, *args)
    state = [tensor._version for tensor in tensors]
    notes: dict[Any, Any] = x.__dict__.setdefault("_amct_lightning_quantized", {})
    key = (operator, *(id(arg) if isinstance(arg, Tensor) else arg for arg in args))
    if key not in notes or notes[key][0] != state:
        notes[key] = (state, operator(x, *args), tensors[1:])  # which live as long as their ids are used
    output: Tensor = notes[key][1]
    return output
