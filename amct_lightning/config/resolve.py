"""Fitting the settings of layers to a model: which layers exist, their defaults, what their type forbids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from amct_lightning.config.layer import LayerConfig
from amct_lightning.config.layer_types import (
    can_be_channel_wise,
    int4_obstacle,
    with_channel_wise_default,
    without_int4,
)
from amct_lightning.wording import abbreviated, closest

if TYPE_CHECKING:
    from torch import nn

NOTHING_ENABLED = (
    'No layer retrain enabled. Set "retrain_enable":true, spelled out, in at least one layer to be quantized.'
)


def resolve_layers(
    layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str
) -> dict[str, LayerConfig]:
    """Do the work of ``RetrainConfig.resolve`` for its layers.

    Args:
        layers: The settings by layer name; layers that are missing are disabled.
        eligible: The layers of the model that can be quantized, by name.
        source: What the settings are called in messages.

    Returns:
        The settings of exactly the eligible layers, in their order, with every default filled in.

    Raises:
        ValueError: If a layer is unknown or cannot be ``channel_wise``, or if no layer is enabled.
    """
    _refuse_unknown_layers(layers, eligible, source)
    _refuse_channel_wise(layers, eligible, source)
    if not any(layer.retrain_enable for layer in layers.values()):
        raise ValueError(f"{source}: {NOTHING_ENABLED}")
    disabled = LayerConfig(retrain_enable=False)
    resolved = {
        name: with_channel_wise_default(layers.get(name, disabled), module) for name, module in eligible.items()
    }
    return _packable(resolved, eligible, source)


def _refuse_unknown_layers(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    unknown = [name for name in layers if name not in eligible]
    if unknown:
        raise ValueError(
            f"unsupported layer {abbreviated(unknown)} in {source}: the model has no such layer, or it "
            f"cannot be quantized.{closest(unknown[0], eligible)} "
            f"Layers that can be quantized: {abbreviated(list(eligible)) or 'none'}."
        )


def _refuse_channel_wise(layers: Mapping[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> None:
    for name, layer in layers.items():
        if layer.retrain_weight_config.channel_wise and not can_be_channel_wise(eligible[name]):
            raise ValueError(
                f"{source}: layer '{name}', key 'retrain_weight_config.channel_wise' must be false: "
                f"a {type(eligible[name]).__name__} layer can not be channel-wise."
            )


def _packable(layers: dict[str, LayerConfig], eligible: Mapping[str, nn.Module], source: str) -> dict[str, LayerConfig]:
    obstacles = {
        name: reason
        for name, layer in layers.items()
        if layer.retrain_enable
        and layer.retrain_weight_config.dst_type == "INT4"
        and (reason := int4_obstacle(eligible[name]))
    }
    if obstacles:
        listed = ", ".join(f"'{name}' ({reason})" for name, reason in obstacles.items())
        warnings.warn(
            f"{source}: INT8 is used instead of INT4 for {listed}: INT4 weights are packed in pairs along "
            "the input-channel axis, which needs an even length and no groups. "
            "Set the dst_type of these layers to INT8 to silence this.",
            stacklevel=4,
        )
    return {name: without_int4(layer) if name in obstacles else layer for name, layer in layers.items()}
