"""Ranges that miss their values, in words: none, or negative ones of a range from 0 on; what to do about batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from amct_lightning.modules.convert import activation_quantizers, quantized_layers
from amct_lightning.modules.folding import current_weight
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers import LearnedWeightQuantizer, WeightQuantizer
from amct_lightning.wording import cut_off

OnDegenerate = Literal["amct", "wait"]
"""What a calibration does with a batch that has no values to make a range of."""


def check_on_degenerate(on_degenerate: str, where: str) -> None:
    """Refuse what is no :data:`OnDegenerate`.

    Args:
        on_degenerate: The value.
        where: Whose argument it is, for the message.
    """
    if on_degenerate not in get_args(OnDegenerate):
        raise ValueError(f"{where}(on_degenerate={on_degenerate!r}): must be 'amct' or 'wait'.")


def set_on_degenerate(model: nn.Module, on_degenerate: OnDegenerate) -> None:
    """Let the calibrations of a model count batches without values, or pass them by.

    Args:
        model: A converted model.
        on_degenerate: ``"amct"`` or ``"wait"``.
    """
    for quantizer in activation_quantizers(model).values():
        quantizer.waits = on_degenerate == "wait"


class Degenerate(NamedTuple):
    """A flag that is on its device still.

    Attributes:
        kind: Whose range it is: that of activations, of a weight with a learned scale, or of another weight; or that
            of activations begins with 0, and they do not.
        layer: Name of the layer, and which of its quantizers if that is not the first.
        flag: 0 if all is well, else positive; 0-d float32.
    """

    kind: Literal["activation", "below_zero", "learned", "weight"]
    layer: str
    flag: Tensor


@torch.no_grad()
def take_degenerate(model: nn.Module) -> list[Degenerate]:
    """Return the flags that nobody has looked at yet, without reading them; the next call returns newer ones only.

    Args:
        model: A converted model, or a wrapper around one.
    """
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    # What one of several processes has calibrated is left until all have agreed.
    quantizers = {
        name: quantizer
        for name, quantizer in activation_quantizers(model).items()
        if quantizer.degenerate is not None and (alone or quantizer.settled)
    }
    found = [Degenerate("activation", name, cast(Tensor, q.degenerate)) for name, q in quantizers.items()]
    found += [Degenerate("below_zero", n, q.below_zero) for n, q in quantizers.items() if q.below_zero is not None]
    ended = set(quantizers.values())
    for name, module in quantized_layers(model).items():
        layer = cast(QATLayer, module)
        calibrated = any(layer.get_quantizer(attribute) in ended for attribute in layer.activation_quantizers)
        found += _weights(name, layer, calibrated)
    for quantizer in ended:
        quantizer.degenerate = quantizer.below_zero = None
    return found


def _weights(name: str, layer: QATLayer, calibrated: bool) -> Iterator[Degenerate]:
    for attribute, parameter in layer.weight_quantizers.items():
        quantizer = cast(WeightQuantizer, getattr(layer, attribute))
        name_of_weight = name if parameter == "weight" else f"{name}.{parameter}"
        if isinstance(quantizer, LearnedWeightQuantizer):
            if quantizer.degenerate is not None:
                yield Degenerate("learned", name_of_weight, quantizer.degenerate)
                quantizer.degenerate = None
        elif calibrated:
            flag = (quantizer.scale == 1).all()  # in the last forward; the weight may have been trained since
            weight = cast(Tensor, getattr(layer, parameter))
            if not isinstance(weight, DTensor):  # weights with a scale of 1 of their own; nothing is gathered for them
                flag = flag & (current_weight(layer, parameter).abs().amax() < 0.5)
            yield Degenerate("weight", name_of_weight, flag.float())


def flags_of(found: Sequence[Degenerate], device: torch.device) -> Tensor:
    """Return the flags as one tensor, to be read at once.

    Args:
        found: The flags.
        device: Where it is to be.
    """
    return torch.stack([item.flag.to(device, non_blocking=True) for item in found])


def degenerate_message(found: Sequence[Degenerate], numbers: Sequence[float]) -> str:
    """Say which ranges had no values, or others than they are for, and what can be done; nothing if all is well.

    Args:
        found: The flags.
        numbers: What was read of them.

    Example:
        >>> degenerate_message([Degenerate("activation", "fc", torch.ones(()))], [1.0]).partition(";")[0]
        "No range could be calibrated for the inputs of 'fc'"
    """
    names: dict[str, list[str]] = {"activation": [], "below_zero": [], "learned": [], "weight": []}
    for item, number in zip(found, numbers, strict=True):
        if number:
            count = f" ({int(number)})" if item.kind == "learned" else ""
            names[item.kind].append(f"'{item.layer}'{count}")
    return " ".join(_SENTENCES[kind].format(cut_off(layers)) for kind, layers in names.items() if layers)


_SENTENCES = {
    "activation": (
        "No range could be calibrated for the inputs of {}; they were 0 or nearly so (below 0.00002 with 8 bits, 0.004 "
        "with 16), as behind a layer whose weights begin with 0. Their scale became 1 as in AMCT, with which all below "
        "0.5 is rounded to 0. Set on_degenerate='wait' to calibrate on until a batch has values, calibrate later "
        "(schedule={{'calibrate': ...}}), give clip_max and clip_min in the configuration, or scale the input."
    ),
    "below_zero": (
        "The inputs of {} were negative in calibration, but their ranges begin with 0 (fixed_min), so that what is "
        "below becomes 0. Set fixed_min to false for these layers in the configuration, and convert anew."
    ),
    "learned": (
        "Learned weight scales began with 1 in {} (the number of scales), because the weights were 0 or nearly so; "
        "weights smaller than 0.5 are rounded to 0. Begin with weights that have values, or use arq_retrain for these "
        "layers, whose scales follow the weights."
    ),
    "weight": (
        "The weights of {} were 0 or nearly so when the calibration ended, and their scale was 1; it follows them as "
        "soon as they have values, unless it is frozen. If they are to stay that small, scale them up."
    ),
}


def warn_degenerate(model: nn.Module) -> None:
    """Warn of ranges that miss their values, once; the host waits for the device if there may be some.

    Args:
        model: A converted model, or a wrapper around one.
    """
    found = take_degenerate(model)
    if found:
        message = degenerate_message(found, flags_of(found, found[0].flag.device).tolist())
        if message:
            warnings.warn(message, stacklevel=3)
