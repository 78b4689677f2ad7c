"""What of a model is served: the network with the names that a server knows, and whether it can be written at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from amct_lightning.amct.data_parallel import unwrap
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.layers import QATLayer
from amct_lightning.wording import cut_off

_CONVERT = "Convert the float model with target='serving' (or 'serving_bfloat16', 'serving_float16') and train that."


class ServedModel(NamedTuple):
    """What is written.

    Attributes:
        network: The module whose names those in the checkpoint are.
        dtype: The dtype that the server has.
        layers: Its quantized layers, by name.
        config: Its configuration in transformers; ``None`` for a network of another kind.
    """

    network: nn.Module
    dtype: torch.dtype
    layers: Mapping[str, QATLayer]
    config: Any


def served_model(model: nn.Module) -> ServedModel:
    """Return what of a model is served.

    Args:
        model: A converted model, or what holds or wraps it. If there is a network of transformers inside, that one is
            served, under its own names.

    Raises:
        ValueError: If it was not converted for servers, or there are layers in it that servers do not load.
    """
    model = unwrap(model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns
    found = find_plan(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not converted: it has no quantized layers. {_CONVERT}")
    root, plan = found
    if plan.serving is None:
        aim = f"for target {plan.target}" if plan.target else "without a target"
        raise ValueError(f"{type(model).__name__} was converted {aim}, so it computes as no server does. {_CONVERT}")
    network = _network_of_transformers(root) or _network_of_transformers(model)
    if network is None:
        network = root
    layers = {name: layer for name, layer in quantized_layers(network).items() if isinstance(layer, QATLayer)}
    if not layers:
        raise ValueError(f"The network {type(network).__name__} inside {type(model).__name__} has no quantized layers.")
    _check_layers(layers)
    return ServedModel(network, getattr(torch, plan.serving), layers, getattr(network, "config", None))


def _network_of_transformers(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if isinstance(getattr(getattr(module, "config", None), "model_type", None), str):
            return module
    return None


def _check_layers(layers: Mapping[str, QATLayer]) -> None:
    wrong = [repr(name) for name, layer in layers.items() if not _is_served(layer)]
    if wrong:
        raise ValueError(
            f"AscendV1 has linear layers with INT8 weights, one scale per output channel and INT8 or float activations "
            f"only, which {cut_off(wrong)} is not. Give it such settings or name it in skip_layers, and convert again."
        )


def _is_served(layer: QATLayer) -> bool:
    weight = layer.weight_quantizer
    bits = getattr(layer.input_quantizer, "num_bits", 8)
    return isinstance(layer, nn.Linear) and weight.num_bits == 8 and not weight.layout.group_size and bits == 8
